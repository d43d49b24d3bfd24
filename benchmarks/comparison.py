"""LoReFT, NodiReFT, LoRA, IA3, a head, the last layer and full fine-tuning on the same records, steps and seeds.

    python benchmarks/comparison.py --data DATA --models minilm=FOLDER smollm2=FOLDER [--families encoder] [--sets sst2]
    python benchmarks/comparison.py --data DATA --models ... --measure      # seconds a step and memory, on an idle machine
    python benchmarks/comparison.py --data DATA --models ... --write LoReFT LoRA    # what they write for instructions/
    python benchmarks/comparison.py --report                                # the tables of docs/results.md

comparison.yaml says what is run; what has been run is kept, with its flags and log, in results/comparison.json, and not
run again unless its flags change. A worker trains on one core. DATA: a folder as docs/tasks.md has it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "comparison.json"
GENERATIONS = HERE / "results" / "generations.json"
CONFIG = HERE / "comparison.yaml"
SEEDS = (0, 1, 2)
KEPT = (
    "learning_rate",
    "trained_numbers",
    "steps",
    "train_records",
    "train_loss",
    "train_seconds",
    "evaluation",
    "scores",
    "notes",
    "versions",
)
Results = dict[str, dict[str, Any]]


class Run(NamedTuple):
    """One training."""

    family: str
    set: str
    method: str
    rate: float | str  # "auto": what suits the model, found by the training itself
    seed: int
    flags: dict[str, Any]  # with {data}, {model} and {benchmarks} where folders are

    @property
    def key(self) -> str:
        return f"{self.set} {self.method} {self.rate} {self.seed}"


def as_rate(rate: Any) -> float | str:
    """YAML reads 1e-3 as text."""
    return rate if rate == "auto" else float(rate)


def the_run(families: dict[str, Any], family: str, task: str, method: str, rate: float | str, seed: int) -> Run:
    """A run of the configuration."""
    what = families[family]
    flags = {"model": "{model}", **what["flags"], **what["sets"][task], **what["methods"][method]["flags"]}
    head_rate = flags.pop("head_rate", None)
    if head_rate is not None and flags.get("method") != "head" and rate != "auto":
        flags["head_lr_scale"] = round(head_rate / as_rate(rate), 3)
    return Run(family, task, method, as_rate(rate), seed, {**flags, "learning_rate": as_rate(rate), "seed": seed})


def as_arguments(flags: dict[str, Any], places: dict[str, str], output_dir: str) -> list[str]:
    """Flags as a command line."""
    found: list[str] = []
    for name, value in {**flags, "output_dir": output_dir}.items():
        text = str(value)
        for place, folder in places.items():
            text = text.replace("{" + place + "}", folder)
        found += [f"--{name}", text]
    quiet = {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "logging_steps": "10",
        "use_cpu": "true",
    }
    return [*found, *(part for name, value in quiet.items() for part in (f"--{name}", value))]


def train(flags: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """The log of one training, in a worker."""
    from fastreft.tasks import train as command
    from fastreft.tasks.errors import UserError
    from fastreft.tasks.flags.train import parse

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        try:
            command.run(parse(as_arguments(flags, places, out)))
        except UserError as error:
            return {"failed": str(error)}
        log = json.loads((Path(out) / "training.json").read_text())
        weights = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    return {**{name: log[name] for name in KEPT if name in log}, "adapter_bytes": weights}


def load() -> Results:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(results: Results, key: str, entry: dict[str, Any]) -> None:
    results[key] = entry
    beside = RESULTS.with_suffix(".new")
    beside.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    beside.replace(RESULTS)


def done(results: Results, run: Run) -> dict[str, Any] | None:
    """The log of a run that has been run with the same flags."""
    entry = results.get(run.key)
    return entry["log"] if entry is not None and entry["flags"] == run.flags else None


def searched(families: dict[str, Any], family: str, task: str) -> str:
    """The set whose search chooses the rate for a set."""
    return families[family].get("rates_of", {}).get(task, task)


def rates_of(families: dict[str, Any], family: str, task: str, method: str) -> list[Any]:
    """The rates that are tried: the method's, or those that a set has for it."""
    what = families[family]
    return what["rates_on"].get(task, {}).get(method) or what["methods"][method]["rates"]


def best_rate(families: dict[str, Any], results: Results, family: str, task: str, method: str) -> Any:
    """The rate with the lowest held-out loss; None while not all have been tried."""
    tried = []
    source = searched(families, family, task)
    for rate in rates_of(families, family, source, method):
        log = done(results, the_run(families, family, source, method, rate, SEEDS[0]))
        if log is None:
            return None
        if "failed" not in log:
            tried.append((log["evaluation"]["eval_loss"], as_rate(rate)))
    return min(tried)[1] if tried else None


def missing(
    families: dict[str, Any], results: Results, chosen: list[str], sets: list[str] | None = None
) -> Iterator[Run]:
    """What is yet to be run and can be now, in the order of the configuration."""
    for family in chosen:
        for task in families[family]["sets"]:
            if sets is not None and task not in sets:
                continue
            for method in families[family]["methods"]:
                rate = best_rate(families, results, family, task, method)
                rates = rates_of(families, family, task, method) if searched(families, family, task) == task else []
                wanted = [(each, SEEDS[0]) for each in rates]
                wanted += [(rate, seed) for seed in SEEDS] if rate is not None else []
                for each, seed in wanted:
                    run = the_run(families, family, task, method, each, seed)
                    if done(results, run) is None:
                        yield run


def run_all(
    families: dict[str, Any],
    chosen: list[str],
    sets: list[str] | None,
    places: dict[str, dict[str, str]],
    workers: int,
) -> None:
    """All that is missing, ``workers`` at a time."""
    results = load()
    running: dict[Future[dict[str, Any]], Run] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        while True:
            busy = {run.key for run in running.values()}
            for run in missing(families, results, chosen, sets):
                if len(running) >= workers:
                    break
                if run.key not in busy:
                    busy.add(run.key)
                    running[pool.submit(train, run.flags, places[run.family])] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                log = future.result()
                print(run.key, log.get("failed") or (log["evaluation"], log.get("scores")), flush=True)
                keep(results, run.key, {"flags": run.flags, "log": log})


def measure(families: dict[str, Any], chosen: list[str], places: dict[str, dict[str, str]], rounds: int) -> None:
    """Seconds a step and peak memory of every method on each family's first set: a process each, the methods alternating."""
    results = load()
    for family in chosen:
        what = families[family]
        task = next(iter(what["sets"]))
        taken: dict[str, list[tuple[float, int]]] = {method: [] for method in what["methods"]}
        for _ in range(rounds):
            for method in what["methods"]:
                flags = the_run(families, family, task, method, what["methods"][method]["rates"][0], 0).flags
                short = {**flags, "max_steps": 12, "hold_out": 0, "max_eval_records": 1}
                with tempfile.TemporaryDirectory() as out:
                    command = [sys.executable, "-m", "fastreft", "train", *as_arguments(short, places[family], out)]
                    subprocess.run(command, check=True, capture_output=True)
                    log = json.loads((Path(out) / "training.json").read_text())
                taken[method].append((log["train_seconds"] / log["steps"], log["peak_memory_bytes"]))
        for method, found in taken.items():
            seconds, memory = (median(values) for values in zip(*found, strict=True))
            print(family, method, seconds, memory, flush=True)
            keep(results, f"cost {family} {method}", {"seconds_a_step": seconds, "peak_memory_bytes": memory})


def write(families: dict[str, Any], places: dict[str, dict[str, str]], methods: list[str]) -> None:
    """What the untouched chat model and each method's best rate, seed 0, write for instructions/, as AlpacaEval reads it."""
    family, task = "chat", "alpaca"
    ask = ["--data_dir", str(HERE / "instructions"), "--max_new_tokens", "128", "--batch_size", "12"]
    command, rows = [sys.executable, "-m", "fastreft"], []
    for method in ["untouched", *methods]:
        with tempfile.TemporaryDirectory() as out:
            whose = ["--base", "true", "--model", places[family]["model"], "--task", task, "--chat", "true"]
            if method != "untouched":
                rate = best_rate(families, load(), family, task, method)
                run = the_run(families, family, task, method, rate, SEEDS[0])
                subprocess.run(
                    [*command, "train", *as_arguments(run.flags, places[family], out)], check=True, capture_output=True
                )
                whose = ["--adapter", out, "--model", places[family]["model"]]
            told = Path(out) / "told.json"
            subprocess.run(
                [*command, "eval", *whose, *ask, "--predictions", str(told)], check=True, capture_output=True
            )
            names = ("instruction", "output", "dataset")
            rows += [
                {**{name: row[name] for name in names}, "generator": method} for row in json.loads(told.read_text())
            ]
        print(method, rows[-1]["output"], flush=True)
        GENERATIONS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def spread(values: list[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def report(families: dict[str, Any]) -> None:
    """The tables: a row a method, a column a set; held-out loss and the test's metrics."""
    results = load()
    for family, what in families.items():
        print(f"\n### {family}\n")
        print("| method | trained | " + " | ".join(what["sets"]) + " | s a step | peak memory | file |")
        print("|---|---|" + "---|" * (len(what["sets"]) + 3))
        for method in what["methods"]:
            cells, trained, sizes = [], [], []
            for task in what["sets"]:
                rate = best_rate(families, results, family, task, method)
                runs = [] if rate is None else [the_run(families, family, task, method, rate, seed) for seed in SEEDS]
                logs = [log for run in runs if (log := done(results, run)) is not None and "failed" not in log]
                if len(logs) < len(SEEDS):
                    cells.append("")
                    continue
                loss = spread([log["evaluation"]["eval_loss"] for log in logs], 3)
                scored = [value for log in logs for value in log.get("scores", {}).values()]
                names = [name for name in scored[0] if name not in ("records", "unparsed")] if scored else []
                of_test = [spread([value[names[0]] for value in scored], 1)] if names else []
                cells.append(" ".join([*of_test, f"({loss})"]))
                trained.append(logs[0]["trained_numbers"])
                sizes.append(logs[0]["adapter_bytes"])
            cost = results.get(f"cost {family} {method}", {})
            last = (
                [f"{cost['seconds_a_step']:.2f}", f"{cost['peak_memory_bytes'] / 2**20:.0f} MiB"] if cost else ["", ""]
            )
            touched = any(as_rate(rate) for rate in what["methods"][method]["rates"])  # "auto" is one, 0 is none
            numbers = f"{min(trained):,}" if trained and touched else ""
            file = f"{min(sizes) / 2**10:,.0f} KiB" if sizes and touched else ""
            print(f"| {method} | {numbers} | {' | '.join(cells)} | {' | '.join(last)} | {file} |")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data")
    arguments.add_argument(
        "--models", nargs="*", default=[], help="NAME=FOLDER of the models that the configuration names"
    )
    arguments.add_argument("--families", nargs="+")
    arguments.add_argument("--sets", nargs="+", help="only these")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--measure", type=int, nargs="?", const=3, metavar="ROUNDS")
    arguments.add_argument("--write", nargs="+", metavar="METHOD")
    arguments.add_argument("--report", action="store_true")
    chosen = arguments.parse_args()
    families = yaml.safe_load(CONFIG.read_text())
    if chosen.report:
        report(families)
        return
    if chosen.data is None:
        arguments.error("--data is needed, but for --report")
    folders = dict(named.split("=", 1) for named in chosen.models)
    wanted = chosen.families or [family for family, what in families.items() if what["model"] in folders]
    places = {
        family: {"data": chosen.data, "benchmarks": str(HERE), "model": folders[families[family]["model"]]}
        for family in wanted
    }
    os.environ["HF_HUB_OFFLINE"] = "1"
    if chosen.measure:
        measure(families, wanted, places, chosen.measure)
        return
    if chosen.write:
        write(families, places, chosen.write)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    run_all(families, wanted, chosen.sets, places, chosen.workers)


if __name__ == "__main__":
    main()
