"""The largest difference between pyreft's outputs and ours, a row an oracle file: `python tests/helpers/oracle_table.py`."""

from __future__ import annotations

import json

import oracles
import torch
from common import SHARED
from torch import Tensor

from fastreft import pyreft
from fastreft.interventions import INTERVENTIONS
from fastreft.pyreft import format


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach() - theirs).abs().max())


def class_row(kind: str) -> str:
    """Outputs of every case of a class, by dtype."""
    name, worst = f"{kind.title()}.pt", dict[str, float]()
    for case in oracles.read(oracles.INTERVENTIONS / name):
        dtype = case["dtype"].removeprefix("torch.")
        made = format.to_intervention(
            case["pyreft_state_dict"], name, kind, dtype=getattr(torch, dtype), act_fn=case["act_fn"]
        )
        worst[dtype] = max(worst.get(dtype, 0.0), difference(made(case["h"]), case["out"]))
    return f"`interventions/{name}`: outputs | " + ", ".join(f"{dtype} {value:.1e}" for dtype, value in worst.items())


def model_row(kind: str, variant: str) -> str:
    """Logits, loss and gradients of a loaded checkpoint, and what it generates."""
    data, folder = oracles.io(kind), oracles.folder(kind, variant)
    wanted = data[f"{variant}_float32"]
    positions = "f2+l3" if variant == "shared" else "f3+l3"
    adapter = pyreft.load(folder, oracles.base_model(kind), positions=positions)
    given = {**oracles.inputs(data), "reft_positions": oracles.columns(wanted, variant)}
    model = pyreft.ReftModel.load(folder, oracles.base_model(kind))
    where = {"sources->base": (None, wanted["unit_locations"])}
    output = model(oracles.inputs(data), unit_locations=where, labels=data["labels"])[1]
    output.loss.backward()
    grads = [
        difference(getattr(m, ours).grad, grad) / float(grad.abs().max())
        for key, m in model.interventions.items()
        for ours, theirs in (("W", "weight"), ("b", "bias"))
        for grad in [wanted["grads_masked_reference"][f"{key}.learned_source.{theirs}"]]
    ]
    logits = oracles.shown(wanted["logits"], data)
    found = [
        f"logits {difference(oracles.shown(output.logits, data), logits):.1e}",
        f"as an adapter {difference(oracles.shown(adapter(**given).logits, data), logits):.1e}",
        f"loss {difference(output.loss, wanted['loss']):.1e}",
        f"gradients {max(grads):.1e} of the largest",
    ]
    if kind == "llama":
        text = adapter.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=0)
        found.append(f"text {'the same' if torch.equal(text, wanted['generate_prompt']) else 'ANOTHER'}")
    return f"`models/{kind}/reft_{variant}` | {', '.join(found)}"


def locations_row() -> str:
    name = "get_intervention_locations.json"
    cases = json.loads((SHARED / "oracles" / name).read_text())
    same = sum(pyreft.get_intervention_locations(**case["kwargs"]) == case["locations"] for case in cases)
    return f"`{name}` | {same} of {len(cases)} the same"


if __name__ == "__main__":
    torch.manual_seed(0)
    rows = [class_row(kind) for kind in INTERVENTIONS]
    rows += [model_row(kind, variant) for kind in oracles.KINDS for variant in oracles.VARIANTS]
    print("\n".join(f"| {row} |" for row in [*rows, locations_row()]))
