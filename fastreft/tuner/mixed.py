"""A batch whose samples have adapters of their own: ``model.generate(..., adapter_names=["formal", "brief", "__base__"])``.

As PEFT's LoRA has it: a name a sample, "__base__" for none, in evaluation, of a forward or of ``generate``, whose beams take
the adapter of the sample that they come from. All adapters of a place edit in one call (:mod:`fastreft.ops.pooled`); where
gradients are asked for, or an edit is none of the kernels', one after the other. Each has its kind, rank and positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..models import layouts
from ..ops.edit import IN_PLACE, settled
from ..ops.pooled import edit_pooled_
from .layer import ReftLayer
from .place_pool import PlacePool, place_pool

BASE = "__base__"
WHOLE = ("modules_to_save", "trainable_token_indices")  # of a configuration: what PEFT wraps a module for
TOO_MANY = "adapter_names has {} names; it must have one a sample, here {}"


class Work(NamedTuple):
    """The rows to edit at a place, and which of its interventions edits each, -1 = none: int64 (n,)."""

    rows: Tensor
    edits: Tensor


class Mixed:
    """The adapters of one call, ``names`` a sample each."""

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.used = [name for name in dict.fromkeys(names) if name != BASE]

    def edit(self, layer: ReftLayer, plan: Any, hidden: Tensor, at_input: bool, where: str) -> Tensor:
        """The hidden state that ``layer`` edits, each sample by its adapter."""
        place = place_pool(layer, at_input, self.used, hidden)
        if place is None:
            return hidden
        work = self._work(layer, plan, hidden, place)
        if torch.is_grad_enabled() or not all(edit.pooled for edit in place.named.edits):
            for i, edit in enumerate(place.edits):
                if edit in place.named.edits:
                    hidden = edit.edit(hidden, work.rows.masked_fill(work.edits != i, -1), where)
            return hidden
        if settled(where, hidden) is not IN_PLACE:
            hidden = hidden.clone()
        return edit_pooled_(hidden, work.rows, work.edits, place.pool)

    def _work(self, layer: ReftLayer, plan: Any, hidden: Tensor, place: PlacePool) -> Work:
        places = None if layer.layout is None else layouts.places(layer.layout, hidden, plan.length)
        tokens = hidden if places is None else places
        key = ("mixed", place.key, tokens.shape[:2], tokens.get_device())
        work = plan.kept.get(key)
        if work is None:
            work = plan.kept[key] = self._computed(layer, plan, tokens, place)
        if places is None:
            return work
        return Work(layouts.take(places, work.rows), work.edits.repeat_interleave(places.shape[-1]))

    def _computed(self, layer: ReftLayer, plan: Any, tokens: Tensor, place: PlacePool) -> Work:
        batch, length = tokens.shape[:2]
        beams = layer._shared.local.here.run is not None  # of generate, which has seen to the number of samples
        if batch % len(self.names) or (batch != len(self.names) and not beams):
            raise ValueError(TOO_MANY.format(len(self.names), batch))
        first: dict[Any, dict[str, int]] = {}  # of each kind of positions: the adapters, and their first interventions
        for name in self.used:
            if name in place.specs:
                spec = place.specs[name]
                first.setdefault((spec.positions, spec.tied), {})[name] = place.first[name]
        found = []
        for (positions, tied), adapters in first.items():
            starts = torch.tensor([adapters.get(name, -1) for name in self.names], device=tokens.device)
            starts = starts.repeat_interleave(batch // len(self.names))
            for share, rows in enumerate(plan.rows(positions, tied, tokens)):
                if rows is None:
                    rows = torch.arange(batch * length, device=tokens.device)
                start = starts[rows.clamp(min=0) // length]
                mine = (rows >= 0) & (start >= 0)
                found.append((rows[mine], start[mine] + share))
        nothing = torch.empty(0, dtype=torch.int64, device=tokens.device)  # a decode step's
        rows, edits = (torch.cat(parts) for parts in zip((nothing, nothing), *found, strict=True))
        return Work(rows, edits)

    @contextmanager
    def heads(self, tuner: Any) -> Iterator[None]:
        """Within it the modules that an adapter trained in full (``modules_to_save``) are each sample's adapter's."""
        trained = any(getattr(config, name, None) for config in tuner.peft_config.values() for name in WHOLE)
        handles = [
            module.register_forward_pre_hook(partial(_with_names, names=self.names), with_kwargs=True)
            for module in (tuner.modules() if trained else ())
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _with_names(module: nn.Module, args: Any, kwargs: Any, names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": names}


def of_call(tuner: Any, names: Any, args: Sequence[Any], given: dict[str, Any]) -> Mixed:
    """The adapters that a call names; ``ValueError`` where they are not one a sample, or not the model's."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapter_names is {names!r}; it must be a list of names, one a sample")
    if tuner.training:
        raise ValueError("adapter_names is for evaluation; the model is in training mode: call model.eval() first")
    if is_compiling():
        raise ValueError("adapter_names is for a model that is not compiled; a compiled one takes set_adapter")
    there = {name for layer in tuner._shared.layers for name in layer.specs}
    unknown = [name for name in dict.fromkeys(names) if name != BASE and name not in there]
    if unknown:
        raise ValueError(
            f"adapter_names holds {unknown[0]!r}; the model's ReFT adapters are {', '.join(sorted(there))}, and {BASE} is none"
        )
    batch = next(
        (t.shape[0] for name in ("input_ids", "inputs", "inputs_embeds", "input_features", "pixel_values")
         if isinstance(t := given.get(name), Tensor)),
        next((t.shape[0] for t in args if isinstance(t, Tensor) and t.ndim > 1), None),
    )  # fmt: skip
    if batch is not None and batch != len(names):
        raise ValueError(TOO_MANY.format(len(names), batch))
    return Mixed(names)
