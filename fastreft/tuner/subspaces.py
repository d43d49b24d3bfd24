"""A batch whose samples are edited with some of R's rows each: ``model(..., subspaces=["german", "instruct", None])``.

A group of rows is an adapter of lower rank, as :mod:`fastreft.ops.subspaces` says; one call a group, each for its own
samples. With text in place of a list all samples have the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..models import layouts
from ..ops.subspaces import Part, parts


def edit(layer: Any, plan: Any, hidden: Tensor, at_input: bool, where: str, names: Iterable[str]) -> Tensor:
    """The hidden state as the adapters ``names`` of a layer leave it, each sample edited with its own rows of them."""
    places = None if layer.layout is None else layouts.places(layer.layout, hidden, plan.length)
    tokens = hidden if places is None else places
    for name in names:
        spec = layer.specs.get(name)
        if spec is None or spec.at_input is not at_input:
            continue
        interventions = layer.interventions(name)
        found = _sorted(plan, spec, interventions[0].r, f"the adapter {name!r}", tokens)
        for intervention, own in zip(interventions, found, strict=False):
            for rows, only in own:
                rows = rows if places is None else layouts.take(places, rows)
                hidden = intervention.edit(hidden, rows, where, True, only)
    return hidden


def _sorted(plan: Any, spec: Any, r: int, whose: str, tokens: Tensor) -> list[list[Part]]:
    """The parts of each intervention's rows; blocks of the same kind share them."""
    key = ("subspaces", whose, spec, r, tokens.shape[:2], tokens.get_device())
    found = plan.kept.get(key)
    if found is None:
        batch, length = tokens.shape[:2]
        chosen = plan.subspaces.rows(spec.groups, r, whose, batch)
        found = plan.kept[key] = [
            parts(rows, chosen, length, tokens.device) for rows in plan.rows(spec.positions, spec.tied, tokens)
        ]
    return found
