"""Concept detection as AxBench has it: whose direction tells texts with a concept from texts without? AUROC, by method.

    python benchmarks/bench_concepts.py --data AXBENCH --model FOLDER [--layer L] [--concepts 10] [--methods M ...]
        [--dtype bfloat16] [--save]

What is saved is not run again.

AXBENCH holds metadata.jsonl, train_data.parquet and latent_eval_data.parquet of concept10 (stanfordnlp/axbench). A concept
has 72 texts with it to learn from, and its genre's without it; 36 with and 36 without it to score, and some hard negatives,
which are of a near concept. A text is a chat of the model's, without what every chat begins and ends with. The score of a
text is its largest latent.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import load_dataset
from harness import device_name, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastreft.concepts import auroc, diff_mean, linear_probe, reft_r1

HERE, SCRIPT = Path(__file__).parent, "bench_concepts"
METHODS = ("diff_mean", "linear_probe", "reft_r1")
SCORED = ("positive", "negative", "hard negative")


def ids_of(tokenizer: Any, row: dict[str, Any], last: int = 0) -> tuple[list[int], int]:
    """A text as the model's chat, without so many of its ``last`` tokens, and where its answer begins."""
    asked = [{"role": "user", "content": row["input"]}]
    whole = [*asked, {"role": "assistant", "content": row["output"]}]
    ids = tokenizer.apply_chat_template(whole, return_dict=False)
    return ids[: len(ids) - last], len(
        tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    )


def in_common(texts: list[list[int]]) -> int:
    """How many tokens all of them begin with."""
    shortest = min(map(len, texts))
    return next((i for i in range(shortest) if len({text[i] for text in texts}) > 1), shortest)


def kept(what: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """What an earlier run of the same model and layer has saved."""
    path = HERE / "results" / device_name() / f"{SCRIPT}.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    return results.get("methods", {}) if all(results.get(name) == value for name, value in what.items()) else {}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--data", type=Path, required=True)
    asked.add_argument("--model", required=True)
    asked.add_argument("--layer", type=int, help="whose output; the middle one if not given")
    asked.add_argument("--concepts", type=int, default=10)
    asked.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    asked.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    asked.add_argument("--save", action="store_true")
    chosen = asked.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=getattr(torch, chosen.dtype)).eval()
    layer = model.config.num_hidden_layers // 2 if chosen.layer is None else chosen.layer
    about = [json.loads(line) for line in (chosen.data / "metadata.jsonl").read_text().splitlines()][: chosen.concepts]
    tables = {
        name: list(load_dataset("parquet", data_files=str(chosen.data / f"{name}.parquet"), split="train"))
        for name in ("train_data", "latent_eval_data")
    }
    some = [ids_of(tokenizer, row)[0] for row in tables["train_data"][:50]]
    first, last = in_common(some), in_common([ids[::-1] for ids in some])
    chat_of = {id(row): ids_of(tokenizer, row, last) for rows in tables.values() for row in rows}
    what = {"model": Path(chosen.model).name, "layer": layer, "first": first, "dtype": chosen.dtype}
    found = kept(what) if chosen.save else {}
    for concept in about:
        number, name = concept["concept_id"], concept["concept"]
        genre = concept["concept_genres_map"][name][0]
        train = tables["train_data"]
        with_it = [chat_of[id(row)] for row in train if row["concept_id"] == number]
        without = [chat_of[id(row)] for row in train if row["concept_id"] < 0 and row["concept_genre"] == genre]
        scored = {
            category: [
                chat_of[id(row)][0]
                for row in tables["latent_eval_data"]
                if row["concept_id"] == number and row["category"] == category
            ]
            for category in SCORED
        }
        for method in chosen.methods:
            rows = found.setdefault(method, {})
            if name in rows:
                continue
            began = time.perf_counter()
            if method == "reft_r1":
                examples = with_it + without
                texts = [ids for ids, _ in examples]
                labels = [[-100] * start + ids[start:] for ids, start in examples]
                direction = reft_r1(model, layer, texts, labels, first=first)
            else:
                find = diff_mean if method == "diff_mean" else linear_probe
                direction = find(model, layer, [ids for ids, _ in with_it], [ids for ids, _ in without], first=first)
            taken = time.perf_counter() - began
            scores = {category: direction.scores(model, texts) for category, texts in scored.items() if texts}
            row = rows[name] = {"auroc": auroc(scores["positive"], scores["negative"]), "seconds": taken}
            if "hard negative" in scores:
                row["auroc_hard"] = auroc(scores["positive"], scores["hard negative"])
            print(method, name, {key: round(value, 3) for key, value in row.items()}, flush=True)
            if chosen.save:
                save(SCRIPT, {**what, "methods": found})
    for method, rows in found.items():
        of_all = [fmean(row[key] for row in rows.values() if key in row) for key in ("auroc", "auroc_hard")]
        print(f"{method:13} {len(rows)} concepts, {of_all[0]:.3f}, against hard ones {of_all[1]:.3f}")


if __name__ == "__main__":
    main()
