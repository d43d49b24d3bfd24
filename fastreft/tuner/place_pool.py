"""All adapters of one place of a model side by side, for a call that mixes them: kept until one that it names has changed."""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import activations
from ..ops.pooled import Pool, pool_of
from .layer import ReftLayer


class Named(NamedTuple):
    """The interventions of the adapters that a call names, and what they were when the pool was filled."""

    names: list[str]
    edits: list[Any]
    scales: list[float]
    parameters: list[Tensor]  # held, so that no other takes the place of one
    versions: list[int]


class PlacePool:
    """The interventions of a layer's adapters, one after the other, with their weights in a :class:`Pool` in this order.

    ``first``: each adapter's first intervention. ``key``: equal for two places where the same adapters edit the same tokens.
    """

    def __init__(self, layer: ReftLayer, at_input: bool, hidden: Tensor):
        self.device, self.dtype = hidden.device, _dtype_for(hidden)
        self.specs = {name: spec for name, spec in layer.specs.items() if spec.at_input is at_input}
        self.first: dict[str, int] = {}
        self.edits: list[Any] = []
        self.of_name: dict[str, list[Any]] = {}
        for name in self.specs:
            self.first[name] = len(self.edits)
            self.of_name[name] = layer.interventions(name)
            self.edits += self.of_name[name]
        self.key = "\n".join(f"{name} {self.first[name]} {spec!r}" for name, spec in self.specs.items())
        # Those that the kernels do not know are edited with in torch, and nothing stands for them.
        nothing = (hidden.new_zeros(1, layer.width, dtype=self.dtype), None, None, None, None), activations.find(None)
        with torch.no_grad():
            weights = [
                (edit.scaled_weights(edit.scale), activations.find(edit.act_fn)) if edit.pooled else nothing
                for edit in self.edits
            ]
        self.pool: Pool = pool_of(weights, self.dtype)
        self.state = {edit: (edit.scale, [(p, p._version) for p in _parameters([edit])]) for edit in self.edits}
        self.named = Named([], [], [], [], [])

    def edits_of(self, names: list[str]) -> list[Any]:
        """The interventions of these adapters."""
        if self.named.names != names:
            edits = [edit for name in names for edit in self.of_name.get(name, ())]
            held = [pair for edit in edits for pair in self.state[edit][1]]
            scales = [self.state[edit][0] for edit in edits]
            self.named = Named(list(names), edits, scales, [p for p, _ in held], [version for _, version in held])
        return self.named.edits

    def holds(self, names: list[str], hidden: Tensor) -> bool:
        """Whether the pool has what these adapters are now. Of hundreds, at each layer of a forward: hence flat lists."""
        edits, (_, _, scales, parameters, versions) = self.edits_of(names), self.named
        now = _parameters(edits)
        return (
            self.device == hidden.device
            and self.dtype is _dtype_for(hidden)
            and len(now) == len(parameters)
            and all(map(is_, now, parameters))
            and [p._version for p in now] == versions
            and [edit.scale for edit in edits] == scales
        )


def _parameters(edits: list[Any]) -> list[Tensor]:
    return [p for edit in edits for p in edit._parameters.values() if p is not None]


def _dtype_for(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype is torch.float64 else torch.float32


def place_pool(layer: ReftLayer, at_input: bool, names: list[str], hidden: Tensor) -> PlacePool | None:
    """The layer's, made anew where one of the named adapters is not what it was; None where it has none of them."""
    found = layer.pools.get(at_input)
    if found is None:
        if not any(spec.at_input is at_input for spec in layer.specs.values()):
            return None
    elif found.holds(names, hidden):
        return found if found.named.edits else None
    found = layer.pools[at_input] = PlacePool(layer, at_input, hidden)
    return found if found.edits_of(names) else None
