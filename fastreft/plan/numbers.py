"""Tokens that come after a cache and are edited by their number: ``a:b``, ``dK``.

A forward over the whole sequence counts its tokens (``positions.py``); here those before it are counted once, so that a step
whose tokens are all meant, or none, makes no tensor. Imports torch alone, beside the positions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .hooks import traced
from .positions import listed
from .spec import MOST, Positions

Numbered = dict[Positions, bool | Tensor]
"""Of some positions: are all tokens of a forward meant, or none; or the number of each sequence's first token there, int64
(B,), or of each token (B, S), below 0 = hidden."""


class Numbers:
    """How many tokens of each sequence are before some column: those that are ``shown`` and, of them, ``written``, int64 (B,),
    or a number for all; None = not known."""

    def __init__(self, shown: Tensor | int, written: Tensor | int | None = None):
        self.before = {False: shown, True: written}
        self.bounds = {kind: _bounds(count) for kind, count in self.before.items() if count is not None}

    def at(self, specs: Iterable[Positions], column: int, columns: int) -> Numbered:
        """Of so many columns, the first of which comes ``column`` after; all are shown. Without what is not known."""
        return {spec: self._at(spec, column, columns) for spec in specs if spec.written in self.bounds}

    def _at(self, spec: Positions, column: int, columns: int) -> bool | Tensor:
        low, high = (bound + column for bound in self.bounds[spec.written])
        end = MOST + high + columns if spec.end is None else spec.end
        if high + columns <= spec.begin or low >= end:
            return False
        if low >= spec.begin and high + columns <= end:
            return True
        before = self.before[spec.written]
        return before + column if isinstance(before, Tensor) else torch.tensor([low])


def after_cache(specs: Iterable[Positions], mask: Tensor | None, cached: int, shape: tuple[int, int]) -> Numbered:
    """Of the (B, S) tokens of a forward after ``cached`` ones, of which ``mask`` (B, cached + S) says which are shown, None =
    all. Which of them are written nothing says. ``ValueError`` for a mask of another shape."""
    wanted = (shape[0], cached + shape[1])
    if mask is None:
        return Numbers(cached).at(specs, 0, shape[1])
    if mask.ndim != 2 or mask.shape[0] != wanted[0] or mask.shape[1] < wanted[1]:  # a static cache's may be longer
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; with past_key_values that hold {cached} tokens, positions that are "
            f"counted need one entry a token, {wanted}"
        )
    shown = mask[:, : wanted[1]] != 0
    found = Numbers(shown[:, :cached].sum(1)).at(specs, 0, shape[1])
    number = (shown.cumsum(1) - 1).masked_fill(~shown, -1)[:, cached:]
    return {spec: number if isinstance(which, Tensor) else which for spec, which in found.items()}


def rows(spec: Positions, which: bool | Tensor, shape: tuple[int, int], device: torch.device) -> list[Tensor | None]:
    """The rows of a flattened hidden state (B, S, d), as :func:`fastreft.plan.positions.rows` gives them; beams are of the
    sample that they come from."""
    if isinstance(which, bool):
        return [None] if which else []
    number = which.to(device).repeat_interleave(shape[0] // len(which), 0)
    if number.ndim == 1:
        number = number[:, None] + torch.arange(shape[1], device=device)
    chosen = number >= spec.begin
    if spec.end is not None:
        chosen = chosen & (number < spec.end)
    return [listed(chosen)]


def _bounds(count: Tensor | int) -> tuple[int, int]:
    """The least and the most of any sequence; a look that waits for a GPU, once."""
    if not isinstance(count, Tensor):
        return count, count
    if traced():
        return 0, MOST
    low, high = torch.stack(torch.aminmax(count)).tolist()
    return low, high
