"""What nearly every test shares: the devices there are, data that may be absent, the tolerance rule."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

SHARED = Path(__file__).resolve().parents[3] / "shared"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def assert_as_good(got: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """The tolerance rule: error against fp64 <= 2 x the error of plain torch in the same dtype + one rounding.

    Errors are relative to each tensor's largest entry, and the largest of the tensors given counts: a sum of a few terms
    alone would make the rule a matter of luck.
    """

    def worst(tensors: list[Tensor]) -> float:
        return max(
            float((t.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-30))
            for t, e in zip(tensors, exact, strict=True)
        )

    assert [t.shape for t in got] == [e.shape for e in exact]
    assert all(bool(torch.isfinite(t).all()) for t in got)
    rounding = max(torch.finfo(t.dtype).eps for t in got)
    if got[0].dtype is torch.float64:  # nothing here is more exact than plain torch itself: its own roundings count
        rounding *= 64
    ours, theirs = worst(got), worst(plain)
    assert ours <= 2 * theirs + rounding, f"error {ours:.3g}, plain torch {theirs:.3g}, one rounding {rounding:.3g}"
