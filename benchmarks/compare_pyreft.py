"""The same run in pyreft and in fastreft: same weights at the start, same data in the same order, 200 steps; both loss curves.

    python benchmarks/compare_pyreft.py [--steps 200] [--lr 1e-3 4e-3] [--plot curves.png] [--save]

The embedded model learns to answer in another manner with LoReFT r = 4 on two layers. pyreft trains with AdamW on its own
parametrization, ours with ReftAdamW on R: two ways of moving on the same manifold, R at the same pace (twice W's rate).
The criterion: the same loss at step 0, and over the last epoch of a run a loss within a tenth of pyreft's, or below it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from bench_pyreft import real_pyreft
from harness import parser, save, table

import fastreft.pyreft
from fastreft import ReftAdamW, param_groups
from fastreft.pyreft import format
from fastreft.tasks.models import load_base, load_tokenizer

LAYERS, R, SAMPLES, BATCH = (2, 4), 4, 64, 8
EXAMPLES = Path(__file__).parent.parent / "examples"


def data(tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Batches of the example data set, padded on the right, each with its locations: the prompt's last token."""
    lines = next(iter(sorted(EXAMPLES.glob("*.jsonl")))).read_text().splitlines()
    records = [json.loads(line) for line in lines if line.strip()][:SAMPLES]
    tokenizer.model_max_length = 128
    module = fastreft.pyreft.make_last_position_supervised_data_module(
        tokenizer, None, [r["prompt"] for r in records], [r["completion"] for r in records], len(LAYERS)
    )
    rows = list(module["train_dataset"])
    return [module["data_collator"](rows[i : i + BATCH]) for i in range(0, len(rows) - BATCH + 1, BATCH)]


def model_of(api: Any, base: Any) -> Any:
    width = base.config.hidden_size
    return api.get_reft_model(
        base,
        api.ReftConfig(
            representations=[
                {
                    "layer": layer,
                    "component": "block_output",
                    "low_rank_dimension": R,
                    "intervention": api.LoreftIntervention(embed_dim=width, low_rank_dimension=R, dtype=torch.float32),
                }
                for layer in LAYERS
            ]
        ),
    )


def train(model: Any, optimizer: torch.optim.Optimizer, batches: list[Any], steps: int) -> list[float]:
    """The loss before each step; the batches in their order, again and again."""
    losses = []
    for i in range(steps):
        batch = batches[i % len(batches)]
        where = {"sources->base": (None, batch["intervention_locations"].permute(1, 0, 2).tolist())}
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        loss = model(inputs, unit_locations=where, labels=batch["labels"])[1].loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def compare(pyreft: Any, batches: list[Any], steps: int, lr: float) -> tuple[dict[str, object], dict[str, list[float]]]:
    torch.manual_seed(0)
    theirs, ours = model_of(pyreft, load_base("embedded")), model_of(fastreft.pyreft, load_base("embedded"))
    with torch.no_grad():
        for mine, other in zip(ours.interventions.values(), theirs.interventions.values(), strict=True):
            mine.load_state_dict(format.to_intervention(dict(other.state_dict()), "pyreft's", "loreft").state_dict())
    curves = {
        "pyreft": train(
            theirs, torch.optim.AdamW(theirs.get_trainable_parameters(), lr=lr, weight_decay=0.0), batches, steps
        ),
        "fastreft": train(ours, ReftAdamW(param_groups(ours, lr=lr)), batches, steps),
    }
    epoch = len(batches)
    apart = [abs(a - b) for a, b in zip(curves["pyreft"], curves["fastreft"], strict=True)]
    last = {name: sum(curve[-epoch:]) / epoch for name, curve in curves.items()}
    row: dict[str, object] = {
        "lr": lr,
        "first loss": curves["pyreft"][0],
        "pyreft, last epoch": last["pyreft"],
        "fastreft, last epoch": last["fastreft"],
        "apart at step 0": apart[0],
        "most apart": max(apart),
        "at step": apart.index(max(apart)),
        "mean apart": sum(apart) / len(apart),
    }
    return row, curves


def draw(curves: dict[str, dict[str, list[float]]], path: str | Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), squeeze=False)
    for axis, (title, pair) in zip(axes[0], curves.items(), strict=True):
        for name, curve in pair.items():
            axis.plot(curve, label=name, linewidth=1)
        axis.set(title=title, xlabel="step", ylabel="loss")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    print(f"drew {path}")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--lr", type=float, nargs="+", default=[1e-3, 4e-3])
    arguments.add_argument("--plot", help="where to draw the curves; with --save, beside the figures if not given")
    options = arguments.parse_args()
    pyreft = real_pyreft()
    if pyreft is None:
        raise SystemExit("pyreft is not installed here: make test-pyreft makes an environment that has it")
    batches = data(load_tokenizer("embedded"))
    rows, curves = [], {}
    for lr in options.lr:
        row, pair = compare(pyreft, batches, options.steps, lr)
        rows.append(row)
        curves[f"lr {lr:g}"] = pair
    table(f"{options.steps} steps from the same start on the same batches", rows)
    saved = save(__file__, {"rows": rows, "curves": curves}) if options.save else None
    plot = options.plot or (saved and saved.with_suffix(".png"))
    if plot:
        draw(curves, plot)


if __name__ == "__main__":
    main()
