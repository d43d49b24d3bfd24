"""A batch of many adapters: what it costs over the bare model, by the number of distinct adapters in it.

    python benchmarks/bench_serving.py [--save] [--model FOLDER] [--only embedded] [--batch N] [--kinds ReFT LoRA formulas]
    python benchmarks/bench_serving.py --plot docs/serving.png [--devices DEVICE ...]          # of what was saved

Prompts of 32 tokens and 16 tokens written after each, greedy: 512 of them in a batch on the embedded model, 64 on a GPT-2 of
random weights and on any other. ``prefill``: a forward, which is the time to a first token; ``token``: the median time between
two tokens of generate; ``tokens/s``: of all of generate. LoReFT r = 4, f5+l5, and PEFT's LoRA r = 8 on all linear layers, by
adapter_names, each sample's adapter the next of so many, or drawn by Zipf's law; and as formulas in plain torch, hung on the
blocks: a loop over the adapters, and low ranks gathered row by row, as others serve edits.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_generate import models, writer
from harness import device_name, keep_heap, measure, parser, save, table
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import fastreft
from fastreft.models.blocks import find_blocks

BATCHES, PROMPT, TOKENS = {"embedded Llama, 2M": 512}, 32, 16
COUNTS = (1, 8, 64, 256, 512)
KINDS = ["ReFT", "LoRA", "formulas"]
LORA_MOST = 64  # PEFT takes a quarter of a second for one of the 64, and longer for each that follows
FIRST = LAST = 5


def owners(batch: int, count: int, zipf: bool = False) -> torch.Tensor:
    """The adapter of each sample."""
    if not zipf:
        return torch.arange(batch) % count
    share = 1 / torch.arange(1, count + 1)
    return torch.multinomial(share, batch, replacement=True, generator=torch.Generator().manual_seed(0))


def adapted(bare: nn.Module, config: Any, count: int) -> nn.Module:
    """The bare model's weights with ``count`` adapters that change something."""
    torch.manual_seed(0)
    model = get_peft_model(
        copy.deepcopy(bare, {id(p): p for p in bare.parameters()}), config(), adapter_name="adapter0"
    )
    for i in range(1, count):
        model.add_adapter(f"adapter{i}", config())
    return model.eval()


def reft() -> Any:
    return fastreft.ReftConfig(r=4, positions=f"f{FIRST}+l{LAST}", task_type="CAUSAL_LM", init_weights="random")


def lora() -> Any:
    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


class Formula:
    """LoReFT of ``count`` adapters as hooks on the blocks, of prompts alone."""

    def __init__(self, bare: nn.Module, batch: int, count: int, gathered: bool):
        self.bare, self.count, self.gathered = bare, count, gathered
        d, self.blocks = bare.config.hidden_size, find_blocks(bare).modules
        self.R = torch.linalg.qr(torch.randn(count, d, 4)).Q.mT.contiguous()
        self.D, self.b = torch.randn(count, 4, d) / d**0.5, torch.randn(count, 4)
        places = torch.cat([torch.arange(FIRST), torch.arange(PROMPT - LAST, PROMPT)])
        rows = torch.arange(batch)[:, None] * PROMPT + places
        self.rows, self.owner = rows.reshape(-1), owners(batch, count).repeat_interleave(len(places))
        self.of = [self.rows[self.owner == i] for i in range(count)]

    def hook(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] != PROMPT:
            return
        flat = hidden.view(-1, hidden.shape[-1])
        if self.gathered:
            h = flat[self.rows]
            z = torch.einsum("nd,nrd->nr", h, self.D[self.owner]) + self.b[self.owner]
            flat[self.rows] = h + torch.einsum("nr,nrd->nd", z, self.R[self.owner])
            return
        for i in range(self.count):
            h = flat[self.of[i]]
            flat[self.of[i]] = h + (h @ self.D[i].T + self.b[i]) @ self.R[i]

    def __call__(self, run: Any) -> Any:
        def hooked() -> None:
            handles = [block.register_forward_hook(self.hook) for block in self.blocks]
            try:
                run()
            finally:
                for handle in handles:
                    handle.remove()

        return hooked


def case(name: str, bare: nn.Module, rounds: int, batch: int, kinds: list[str]) -> list[dict[str, Any]]:
    bare = bare.eval()
    counts = sorted({batch, *(count for count in COUNTS if count <= batch)})
    ids = torch.randint(5, bare.config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prefills: dict[str, Any] = {"bare": torch.no_grad()(lambda: bare(**given))}
    tokens: dict[str, list[float]] = {"bare": []}
    writes: dict[str, Any] = {"bare": writer(bare, ids, TOKENS, tokens["bare"])}
    for kind, config, most in (("ReFT", reft, max(counts)), ("LoRA", lora, min(LORA_MOST, max(counts)))):
        if kind not in kinds:
            continue
        model = adapted(bare, config, most)
        for count, zipf in [*((count, False) for count in counts if count <= most), (most, True)]:
            of = owners(batch, count, zipf)
            key = f"{kind} Zipf, {len(of.unique())} of {count}" if zipf else f"{kind} {count}"
            named = Named(model, [f"adapter{i}" for i in of])
            tokens[key] = []
            prefills[key] = torch.no_grad()(lambda named=named: named(**given))
            writes[key] = writer(named, ids, TOKENS, tokens[key])
    for count in counts if "formulas" in kinds else ():
        for gathered in (False, True):
            formula = Formula(bare, batch, count, gathered)
            prefills[f"{'gathered' if gathered else 'loop'} {count}"] = formula(prefills["bare"])
    prefill = measure(prefills, rounds=rounds, budget_s=300)
    whole = measure(writes, rounds=rounds, warmup=1, budget_s=300)
    per_token = {key: median(found) for key, found in tokens.items()}
    rows = []
    for key in prefills:
        row = {"model": name, "batch": batch, "adapters": key, "prefill ms": prefill[key]}
        row["over bare"] = prefill[key] / prefill["bare"]
        if key in per_token:
            row |= {"token ms": per_token[key], "token over bare": per_token[key] / per_token["bare"]}
            row |= {"tokens/s": 1e3 * batch * TOKENS / whole[key], "of bare's": whole["bare"] / whole[key]}
        rows.append(row)
    return rows


class Named:
    """A model whose calls name their adapters."""

    def __init__(self, model: nn.Module, adapters: list[str]):
        self.model, self.adapters = model, adapters

    def __call__(self, **given: Any) -> Any:
        return self.model(**given, adapter_names=self.adapters)

    def generate(self, **given: Any) -> Any:
        return self.model.generate(**given, adapter_names=self.adapters)


def saved(device: str) -> list[dict[str, Any]]:
    """The rows that were saved on a device."""
    path = Path(__file__).parent / "results" / device / "bench_serving.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def plot(rows: list[dict[str, Any]], file: str) -> None:
    """Tokens a second and the time to the first one against the adapters in a batch, a panel each and a row a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(len(models), 2, figsize=(9, 3.2 * len(models)), squeeze=False, layout="constrained")
    for (left, right), model in zip(axes, models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        bare = next(row for row in mine if row["adapters"] == "bare")
        named = (row["adapters"].split() for row in mine if row["adapters"].count(" ") == 1)
        ticks = sorted({int(count) for _, count in named})
        for kind, name in (("ReFT", "LoReFT"), ("LoRA", "PEFT's LoRA"), ("loop", "a loop"), ("gathered", "gathered")):
            own = [row for row in mine if row["adapters"].split()[0] == kind and "Zipf" not in row["adapters"]]
            counts = [int(row["adapters"].split()[1]) for row in own]
            for axis, key in ((left, "tokens/s"), (right, "prefill ms")):
                if own and all(key in row for row in own):
                    axis.plot(counts, [row[key] for row in own], "o-", label=name)
        for axis, key in ((left, "tokens/s"), (right, "prefill ms")):
            axis.axhline(bare[key], color="gray", linestyle="--", label="the bare model")
            axis.set(
                xscale="log",
                xlabel="distinct adapters in the batch",
                ylabel=key,
                title=f"{model}, {bare['batch']} prompts",
            )
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.legend(fontsize="small", loc="lower left", ncols=2 if key == "prefill ms" else 1)
    figure.savefig(file, dpi=110)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", help="a folder of one more causal language model")
    arguments.add_argument("--only", help="the models whose names begin so")
    arguments.add_argument("--batch", type=int, help="prompts in a batch")
    arguments.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is measured beside the bare model"
    )
    arguments.add_argument("--plot", help="a file for a picture of what was saved; nothing is measured")
    arguments.add_argument(
        "--devices",
        nargs="+",
        default=[device_name()],
        help="folders of results that --plot draws, a later one's models in place of an earlier one's",
    )
    chosen = arguments.parse_args()
    if chosen.plot:
        latest: dict[str, list[dict[str, Any]]] = {}
        for device in chosen.devices:
            rows = saved(device)
            for name in {row["model"]: None for row in rows}:
                latest[name] = [row for row in rows if row["model"] == name]
        plot([row for rows in latest.values() for row in rows], chosen.plot)
        return
    keep_heap()
    there = models()
    if chosen.model:
        there[Path(chosen.model).name] = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    results = []
    for name, bare in there.items():
        if not name.startswith(chosen.only or ""):
            continue
        rows = case(name, bare, chosen.rounds, chosen.batch or BATCHES.get(name, 64), chosen.kinds)
        table(name, rows)
        results += rows
    if chosen.save:  # in the place of the same ones, beside what was not run this time
        rows = {(row["model"], row["adapters"]): row for row in [*saved(device_name()), *results]}
        save(__file__, list(rows.values()))


if __name__ == "__main__":
    main()
