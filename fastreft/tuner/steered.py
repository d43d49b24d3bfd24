"""Adapters at strengths of the caller's: ``with model.reft(scale=-1.0, adapters=["formal", "brief"]): ...``.

In place of the adapters that are active, those that are named edit, each from the hidden state h that comes to the place:

    h + s_1 (edit_1(h) - h) + s_2 (edit_2(h) - h) + ...

so that their order is nothing to them, where ``set_adapter(["formal", "brief"])`` has the second edit what the first left. A
strength of 1 is an adapter as it was trained, 0 none of it, below 0 the other way; a list has one for each sample of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..models import layouts
from ..ops.edit import NEW
from ..plan.silence import refuse_compiled

Scale = float | Sequence[float]
WANTED = "it must be a finite number, or a list of them, one a sample"
COMPILED = (
    "model.reft() is for a model that is not compiled, whose graph would keep its strengths; leave torch.compile out"
)
NOTHING = (
    "this forward in training edits nothing: model.reft() gives no adapter a strength other than 0; give one, leave the "
    "context out, or have disable_adapter() say that the base model is meant"
)


class Strengths:
    """What :class:`fastreft.tuner.model.ReftModel` has to say how strong its edits are."""

    peft_config: Any
    active_adapters: Any
    model: Any
    _shared: Any

    def set_scale(self, scale: float, adapters: str | list[str] | None = None) -> None:
        """From now on h + scale (edit(h) - h) in place of edit(h): 1 is the adapter as it was trained, 0 the base model, below
        0 the other way. ``adapters``: those that it is for, all of ReFT's if not given. Of this model in memory alone: it is
        not saved, nor does it touch modules that were trained whole. ``ValueError`` for a scale that is no finite number or an
        adapter that there is not."""
        scale = finite(scale, f"scale is {scale!r}; it must be a finite number")
        found = _scales(scale, self._ours() if adapters is None else adapters, self._ours())
        for layer in self._shared.layers:
            for name, own in found.items():
                for intervention in layer.interventions(name):
                    intervention.scale = own

    def reft(self, scale: Any = 1.0, adapters: Any = None) -> AbstractContextManager[None]:
        """Within ``with model.reft(...)`` the named ReFT adapters, the active ones if None, edit at these strengths, each from
        the state that comes to its place: h + sum of s_i (edit_i(h) - h).

        ``scale``: 1 = as trained, 0 = not at all, below 0 the other way, or a list of numbers, one a sample; ``adapters``: a
        name, names, or {name: a factor of ``scale``}. Of this thread, in inference or training, cached or not; what was there
        before comes back behind it. ``ValueError`` for a number that is not finite, an adapter that there is not, and, in a
        forward, another count of samples, or in training no strength but 0; ``RuntimeError`` in a compiled one.
        """
        active = [name for name in self.active_adapters if name in self._ours()]
        found = _scales(scale, active if adapters is None else adapters, self._ours())
        return _steering(self._shared.local.here, Steered(found))

    def _ours(self) -> list[str]:
        return [name for name, config in self.peft_config.items() if config.peft_type == "REFT"]


class Steered:
    """The adapters of a context, each with its strength, or its strengths, one a sample."""

    def __init__(self, scales: Mapping[str, Scale]):
        self.scales = dict(scales)
        self.nothing = not any(any(each) if isinstance(each, Sequence) else each for each in scales.values())

    def edit(self, layer: Any, plan: Any, hidden: Tensor, at_input: bool, where: str) -> Tensor:
        """The hidden state that ``layer`` edits."""
        if is_compiling():
            refuse_compiled(COMPILED)
            return hidden
        if self.nothing and plan.training:
            raise ValueError(NOTHING)
        here = [name for name in self.scales if name in layer.specs and layer.specs[name].at_input is at_input]
        places = None if layer.layout is None else layouts.places(layer.layout, hidden, plan.length)
        tokens = hidden if places is None else places
        beams = layer._shared.local.here.run is not None  # of generate, whose beams are of its samples
        found = hidden
        for name in here:
            spec = layer.specs[name]
            listed = plan.rows(spec.positions, spec.tied, tokens)
            for edit, rows in zip(layer.interventions(name), listed, strict=False):
                for scale, own in _parts(self.scales[name], rows, tokens, beams):
                    own = own if places is None or own is None else layouts.take(places, own)
                    if len(here) == 1:  # whose parts are of rows that differ
                        found = edit.edit(found, own, where, scale=scale)
                    else:
                        found = found + (edit.edit(hidden, own, NEW, scale=scale) - hidden)
        return found


def _parts(scale: Scale, rows: Tensor | None, tokens: Tensor, beams: bool) -> Iterator[tuple[float, Tensor | None]]:
    """Each strength that is not 0, and the rows that have it; None for every row."""
    if not isinstance(scale, Sequence):
        if scale:
            yield scale, rows
        return
    batch, length = tokens.shape[:2]
    if batch % len(scale) or (batch != len(scale) and not beams):
        raise ValueError(f"scale has {len(scale)} numbers; it must be one number, or one a sample, here {batch}")
    if rows is None:
        rows = torch.arange(batch * length, device=tokens.device)
    each = torch.tensor(scale, dtype=torch.float64, device=tokens.device).repeat_interleave(batch // len(scale))
    of_row = each[rows.clamp(min=0) // length]
    for value in sorted(set(scale) - {0}):
        yield value, rows.masked_fill(of_row != value, -1)


def _scales(scale: Any, adapters: Any, ours: Sequence[str]) -> dict[str, Any]:
    """The strength, or strengths, of each adapter: ``scale`` times that of ``adapters``, where it is a dict."""
    names = [adapters] if isinstance(adapters, str) else adapters
    if not isinstance(names, Collection) or any(name not in ours for name in names):
        raise ValueError(f"adapters is {adapters!r}; the ReFT adapters of this model are {', '.join(ours)}")
    factors = {
        name: finite(factor, f"adapters gives {name!r} {factor!r}; it must be a finite number")
        for name, factor in (names if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)).items()
    }
    each = scale.tolist() if hasattr(scale, "tolist") else scale  # of torch's, or of numpy's
    if not isinstance(each, (list, tuple)):
        one = finite(each, f"scale is {scale!r}; {WANTED}")
        return {name: one * factor for name, factor in factors.items()}
    numbers = [finite(one, f"scale is {scale!r}; {WANTED}") for one in each or [None]]
    return {name: [one * factor for one in numbers] for name, factor in factors.items()}


def finite(number: Any, said: str) -> float:
    """A number, torch's and numpy's too, as Python's own; ``ValueError(said)`` for what is none, or is not finite."""
    plain = number.tolist() if hasattr(number, "tolist") else number
    try:
        found = float(plain) if isinstance(plain, Real) and not isinstance(plain, bool) else math.nan
    except OverflowError:  # an integer beyond all floats
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(said)
    return found


@contextmanager
def _steering(here: Any, steered: Steered) -> Iterator[None]:
    """Within it this thread's forwards edit so, but for a call that names ``adapter_names``."""
    before = here.steered, here.mixed
    here.steered = here.mixed = steered
    try:
        yield
    finally:
        here.steered, here.mixed = before
