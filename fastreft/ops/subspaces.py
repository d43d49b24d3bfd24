"""Edits of some of R's rows: which each sample of a batch is edited with, and the weights of those rows alone.

R's rows are orthonormal, so that a group S of them is an adapter of its own, of lower rank:

    h + R_S^T (act(W_S h + b_S) - R_S h)

which the same kernels compute, and of which rows outside S have a gradient of exactly 0. Groups edit orthogonal parts of h,
so that the edits of two groups together are the sum of theirs (of an edit of every row that reads the same h). Source: ReFT
(Wu et al. 2024, arXiv 2404.03592), the appendix on composition; pyvene's ``subspaces``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import Weights
from .groups import ONE, Choice, Groups, Rows, choice_of, rows_of

Part = tuple[Tensor | None, Tensor | None]
"""Rows of the hidden state, None = every one; and the rows of the edit that edit them, None = all."""


class Choices(NamedTuple):
    """What each sample of a batch is edited with; ``one`` of them for all."""

    samples: tuple[Choice, ...]
    one: bool = False

    def check(self, batch: int, beams: bool = False) -> None:
        """``ValueError`` where they are not one a sample; with ``beams`` a sample may have several rows of the batch."""
        known = len(self.samples)
        if not self.one and (not known or batch % known or (batch != known and not beams)):
            raise ValueError(f"subspaces has {known} entries; it must have one a sample, here {batch}")

    def rows(self, groups: Groups, r: int, whose: str, batch: int) -> list[Rows]:
        """The rows of an edit that each sample of a batch has, that of beams being their sample's."""
        known = {choice: rows_of(choice, groups, r, whose) for choice in self.samples}
        return [known[choice] for choice in self.over(batch)]

    def over(self, batch: int) -> list[Choice]:
        """The choice of each sample of a batch."""
        return [choice for choice in self.samples for _ in range(batch // len(self.samples))]

    @property
    def nothing(self) -> bool:
        """Is no sample edited?"""
        return all(choice == () for choice in self.samples)


def parse(given: Any) -> Choices:
    """A choice for all samples (text), or a list, or a tensor of integers (B,) or (B, k) in which negative ones are padding,
    of one a sample. ``ValueError`` for anything else. A tensor on a GPU is waited for."""
    if isinstance(given, str):
        return Choices((choice_of(given),), one=True)
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool or given.ndim not in (1, 2):
            raise ValueError(
                f"subspaces has shape {tuple(given.shape)} and dtype {given.dtype}; a tensor must be integers of shape "
                "(batch, n), -1 where a sample has fewer"
            )
        table = given.reshape(len(given), -1).tolist()
        return Choices(tuple(tuple(number for number in numbers if number >= 0) for numbers in table))
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"subspaces is a {type(given).__name__}; it must have one entry a sample, and {ONE}")
    return Choices(tuple(map(choice_of, given)))


def padded(numbers: Sequence[Sequence[int]]) -> Tensor:
    """Choices as the tensor (B, n) that :func:`parse` takes."""
    most = max(map(len, numbers))
    return torch.tensor([[*own, *[-1] * (most - len(own))] for own in numbers])


def parts(rows: Tensor | None, chosen: Sequence[Rows], length: int, device: torch.device) -> list[Part]:
    """The rows to edit, sorted by what edits them: ``rows`` int64 (B * n,) of a hidden state (B, length, d), n a sample,
    -1 = skip, None = all; ``chosen`` a sample each. No value is looked at."""
    kinds = [kind for kind in dict.fromkeys(chosen) if kind != ()]
    if len(set(chosen)) == 1:
        return [(rows, _index(kind, device)) for kind in kinds]
    table = torch.arange(len(chosen) * length, device=device) if rows is None else rows
    table = table.view(len(chosen), -1)
    found: list[Part] = []
    for kind in kinds:
        samples = torch.tensor([i for i, own in enumerate(chosen) if own == kind], device=device)
        found.append((table[samples].reshape(-1), _index(kind, device)))
    return found


def _index(rows: Rows, device: torch.device) -> Tensor | None:
    return None if rows is None else torch.tensor(rows, dtype=torch.int64, device=device)


def restricted(w: Weights, only: Tensor) -> Weights:
    """The weights of some rows of an edit, of which the others get no gradient; a P that is U stays so."""
    U, V, P, b, c = w
    made = U.index_select(0, only)
    V, b, c = (None if weight is None else weight.index_select(0, only) for weight in (V, b, c))
    if P is not None:
        P = made if P is U else P.index_select(0, only)
    return made, V, P, b, c
