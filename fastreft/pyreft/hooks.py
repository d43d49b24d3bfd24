"""The edits of a base model while a :class:`fastreft.pyreft.ReftModel` runs it; otherwise it is left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..interventions import Intervention
from ..ops.edit import NEW, WHERE_ALLOWED
from ..plan.hooks import PerThread, hang
from ..plan.past import Past
from .components import Place, block_names
from .locations import Locations


class _Here:
    """What a thread is in: the locations of a call of ours, which are the plan of its forwards."""

    def __init__(self) -> None:
        self.plan: Locations | None = None


class _Plain:
    """The plan of a forward of the untouched model, so that a recomputation of its blocks is known for one."""

    idle = True


class Hooks:
    """Every place of the model with its interventions, counted as the representations are."""

    def __init__(self, model: nn.Module, places: Sequence[Place], interventions: Sequence[Intervention]):
        self.local = PerThread(_Here, Past())
        edits: dict[Place, list[tuple[int, Intervention]]] = {}
        for i, (place, intervention) in enumerate(zip(places, interventions, strict=True)):
            edits.setdefault(place, []).append((i, intervention))
        blocks = set(block_names(model))
        for place, here in edits.items():
            at_input = place.side == "input"
            # A block's output is nobody else's; another module's may be kept for its backward.
            fresh = not at_input and place.name in blocks
            hang(model.get_submodule(place.name), self.local, _Edits(here, fresh), at_input=at_input)
        generators = [m for m in model.modules() if getattr(m, "can_generate", bool)()]
        for module in {id(m): m for m in (model, *generators)}.values():
            module.register_forward_pre_hook(self._begin, with_kwargs=True)

    def run(self, where: Locations | None, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """``call(**arguments)``, with the model edited at ``where``; None for nowhere."""
        outer, self.local.here.plan = self.local.here.plan, where
        began = torch.autograd._get_sequence_nr()
        try:
            output = call(**arguments)
        finally:
            self.local.here.plan = outer
        if torch.is_grad_enabled():
            self.local.past.note(_Plain() if where is None else where, began, output)
        return output

    def _begin(self, module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        where = self.local.here.plan
        if where is None:
            return
        where.begin(decoding=getattr(kwargs.get("past_key_values"), "get_seq_length", int)() > 0)


class _Edits:
    """The edits at one place, in their order; in place where the module's output is ``fresh``."""

    def __init__(self, edits: list[tuple[int, Intervention]], fresh: bool):
        self.edits, self.fresh = edits, fresh

    def __call__(self, _module: nn.Module, where: Locations, hidden: Tensor) -> Tensor:
        kind = WHERE_ALLOWED if self.fresh and not torch.compiler.is_compiling() else NEW
        shape = (hidden.shape[0], hidden.shape[1])
        for i, intervention in self.edits:
            if where.subspaces is None:
                hidden = intervention.edit(hidden, where.rows(i, shape, hidden.device), kind)
                continue
            for rows, only in where.parts(i, intervention, shape, hidden.device):
                hidden = intervention.edit(hidden, rows, kind, True, only)
        return hidden
