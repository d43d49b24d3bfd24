"""Rows of an R that a step leaves alone: those that none of its samples was edited with (``subspaces``).

Their gradient is exactly 0. Its projection is not, as R's rows turn together, and Adam, which divides a gradient by its own
size, would take whole steps along what is left of it. So they stay as they are, with their moments, as torch's SparseAdam
leaves rows without a gradient, and the others become orthonormal beside them: they come later in the retraction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional


class Idle(NamedTuple):
    """The idle ones, bool (r, 1), of an R and of what was ``held`` for it, and how all of these were before a step."""

    rows: Tensor
    held: tuple[Tensor, ...]
    before: tuple[Tensor, ...]

    def keep_(self) -> None:
        """Put the idle rows back after a step, and the rest of R, the first of ``held``, orthonormal to them."""
        for now, then in zip(self.held, self.before, strict=True):
            now.copy_(torch.where(self.rows, then, now))
        R, order = self.held[0], torch.argsort(self.rows[:, 0].logical_not().byte(), stable=True)
        mended = R[order]
        functional.retract_([mended])
        R.copy_(torch.where(self.rows, R, mended[torch.argsort(order)]))


def of(by_rows: set[int], parameter: Any, gradient: Tensor, *held: Tensor) -> Idle | None:
    """What a step of the R ``held[0]`` with a ``gradient`` is to leave alone; None where all of its rows edit every sample,
    ``parameter`` not being one of ``by_rows`` (:func:`fastreft.interventions.edited_by_rows`, asked once a step), and where
    a CPU sees that none is idle."""
    if id(parameter) not in by_rows:
        return None
    rows = (gradient == 0).all(1, keepdim=True)
    if rows.is_cpu and not bool(rows.any()):
        return None
    return Idle(rows, held, tuple(tensor.clone() for tensor in held))
