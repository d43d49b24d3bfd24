"""Held-out loss against learning rate, for models of several widths and depths, and where fastreft.suggest_lr's rate lies.

    python benchmarks/rates.py --data DATA --models embedded minilm=FOLDER smollm2=FOLDER [--plot docs/rates.png]

Each point is a run of `fastreft train`, in a process of its own, of --seeds seeds; what has been run is kept in
results/rates.json and not run again. DATA: a folder with glue/SST-2, llm_adapters/ARC-Easy and so on, as the tasks read them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "rates.json"
RATES = (3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
SPEECH = ("--train_file", str(HERE.parent / "examples" / "speech.jsonl"), "--hold_out", "40")
# model -> (what it is trained on and for how long, the edits, the rates that are of interest)
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[float, ...]]] = {
    "embedded": ((*SPEECH, "--max_steps", "200", "--per_device_train_batch_size", "8"), ("f5+l5", "all"), RATES[1:]),
    "stories260K": ((*SPEECH, "--max_steps", "200", "--per_device_train_batch_size", "8"), ("f5+l5", "all"), RATES[1:]),
    "minilm": (
        ("--task", "sst2", "--data_dir", "{data}/glue", "--max_train_records", "4000", "--max_eval_records", "400",
         "--max_steps", "120", "--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "50"),
        ("f3", "all"), RATES[:7],
    ),
    "smollm2": (
        ("--task", "ARC-Easy", "--data_dir", "{data}/llm_adapters", "--hold_out", "60", "--max_eval_records", "1",
         "--max_steps", "60", "--per_device_train_batch_size", "4"),
        ("f5+l5", "all"), RATES[:5],
    ),
    "smollm2-alpaca": (
        ("--task", "alpaca", "--data_dir", "{data}/alpaca", "--chat", "true", "--max_length", "128", "--too_long", "drop",
         "--hold_out", "240", "--max_eval_records", "1", "--max_steps", "60", "--per_device_train_batch_size", "4",
         "--warmup_steps", "0.1"),
        ("all",), RATES[:4],
    ),
}  # fmt: skip


def key(model: str, positions: str, start: str, rate: float | str, seed: int) -> str:
    return f"{model} {positions} {start} {rate} {seed}"


def run(model: str, folder: str, data: str, positions: str, start: str, rate: float | str, seed: int) -> dict[str, Any]:
    """One training; what its log says."""
    what, _, _ = CASES[model]
    with tempfile.TemporaryDirectory() as out:
        flags = [flag.format(data=data) for flag in what]
        command = [
            *(sys.executable, "-m", "fastreft", "train", "--model", folder, *flags, "--output_dir", out),
            *("--positions", positions, "--r", "4", "--init_weights", start, "--learning_rate", str(rate)),
            *("--seed", str(seed), "--dtype", "float32", "--use_cpu", "true", "--save_strategy", "no"),
            *("--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "10"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1]}
        log = json.loads((Path(out) / "training.json").read_text())
    found = {"loss": log["evaluation"]["eval_loss"], "rate": log["learning_rate"], "seconds": log["train_seconds"]}
    if "eval_accuracy" in log["evaluation"]:
        found["accuracy"] = log["evaluation"]["eval_accuracy"]
    return found


def curves(results: dict[str, Any], seeds: int) -> dict[tuple[str, str, str], list[tuple[Any, float]]]:
    """(model, positions, start) -> (rate or "auto", mean loss) of what has been run with every seed."""
    found: dict[tuple[str, str, str], list[tuple[Any, float]]] = {}
    for model, (_, edits, rates) in CASES.items():
        for positions in edits:
            for start in ("identity", "random"):
                for rate in (*rates, "auto"):
                    losses = [results.get(key(model, positions, start, rate, s), {}).get("loss") for s in range(seeds)]
                    if all(loss is not None for loss in losses):
                        found.setdefault((model, positions, start), []).append((rate, fmean(losses)))
    return found


def report(results: dict[str, Any], seeds: int) -> None:
    print("| model, positions, start | best rate | its loss | suggested | its loss |\n|---|---|---|---|---|")
    for (model, positions, start), points in curves(results, seeds).items():
        plain = [(loss, rate) for rate, loss in points if rate != "auto"]
        auto = dict(points).get("auto")
        if not plain or auto is None:
            continue
        loss, rate = min(plain)
        suggested = results[key(model, positions, start, "auto", 0)]["rate"]
        print(f"| {model}, {positions}, {start} | {rate:g} | {loss:.3f} | {suggested:g} | {auto:.3f} |")


def plot(results: dict[str, Any], seeds: int, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = curves(results, seeds)
    places = list(dict.fromkeys((model, positions) for model, positions, _ in found))
    figure, axes = plt.subplots(2, (len(places) + 1) // 2, figsize=(3.2 * ((len(places) + 1) // 2), 6), squeeze=False)
    for axis, (model, positions) in zip(axes.flat, places, strict=False):
        for start, colour in (("identity", "#2f6db3"), ("random", "#c2632b")):
            points = found.get((model, positions, start), [])
            plain = [(rate, loss) for rate, loss in points if rate != "auto"]
            axis.plot(*zip(*plain, strict=True), "o-", color=colour, label=start, markersize=4) if plain else None
            auto = dict(points).get("auto")
            if auto is not None:
                rate = results[key(model, positions, start, "auto", 0)]["rate"]
                axis.plot([rate], [auto], "*", color=colour, markersize=14, markeredgecolor="black")
        axis.set(title=f"{model}, {positions}", xscale="log", xlabel="learning rate", ylabel="held-out loss")
        axis.set_xlim(2e-4, 1.4e-1)  # the same for all
        lows = [loss for start in ("identity", "random") for _, loss in found.get((model, positions, start), [])]
        stars = [dict(found.get((model, positions, start), [])).get("auto", 0.0) for start in ("identity", "random")]
        axis.set_ylim(min(lows) * 0.95, min(max(lows), max(2.2 * min(lows), *stars)) * 1.02)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(places) :]:
        axis.axis("off")
    axes.flat[0].legend(title="start", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", required=True)
    arguments.add_argument("--models", nargs="+", default=["embedded"], help="NAME or NAME=FOLDER, of those in CASES")
    arguments.add_argument("--seeds", type=int, default=1)
    arguments.add_argument("--starts", nargs="+", default=["identity", "random"])
    arguments.add_argument("--plot")
    chosen = arguments.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for named in chosen.models:
        model, _, folder = named.partition("=")
        _, edits, rates = CASES[model]
        for seed in range(chosen.seeds):
            for positions in edits:
                for start in chosen.starts:
                    for rate in ("auto", *rates):
                        what = key(model, positions, start, rate, seed)
                        if what in results:
                            continue
                        found = run(model, folder or model, chosen.data, positions, start, rate, seed)
                        print(what, found, flush=True)
                        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                        results[what] = found
                        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    report(results, chosen.seeds)
    if chosen.plot:
        plot(results, chosen.seeds, chosen.plot)


if __name__ == "__main__":
    main()
