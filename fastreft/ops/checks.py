"""What an edit's arguments must be: one sentence for what is not, before any work, and rows as the kernels take them."""

from __future__ import annotations

import re

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Weights = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""(U, V, P, b, c) of the primitive, None for a term left out; P is U itself where the two are one (LoReFT's R)."""


ZERO3 = (
    "DeepSpeed's ZeRO-3 shards the model's parameters, so that an edit would find its own empty: train with ZeRO-1 or 2, or "
    "with FSDP2, which shards the frozen model as well"
)


def check(h: Tensor, w: Weights, rows: Tensor | None = None) -> None:
    """``TypeError`` or ``ValueError`` naming the argument, what came and what was wanted."""
    U, V, P, b, c = w
    if h.dtype not in FLOATS:
        raise TypeError(f"h is {h.dtype}; it must be float32, bfloat16, float16 or float64")
    if h.dim() == 0:
        raise ValueError("h is a scalar; it must be (..., d)")
    if any(getattr(weight, "ds_id", None) is not None for weight in w):
        raise ValueError(ZERO3)
    if U.dim() != 2 or U.shape[1] != h.shape[-1]:
        raise ValueError(
            f"the weight matrix is {tuple(U.shape)}; for h of shape {tuple(h.shape)} it must be (r, {h.shape[-1]})"
        )
    r = U.shape[0]
    for name, weight, shape in (("V", V, (r, h.shape[-1])), ("P", P, (r, h.shape[-1])), ("b", b, (r,)), ("c", c, (r,))):
        if weight is not None and weight.shape != shape:
            raise ValueError(f"{name} is {tuple(weight.shape)}; it must be {shape}")
    for weight in (U, V, P, b, c):
        if weight is None:
            continue
        if weight.dtype not in FLOATS:
            raise TypeError(f"a weight is {weight.dtype}; it must be float32, bfloat16, float16 or float64")
        if weight.device != h.device:
            raise ValueError(f"a weight is on {weight.device} and h on {h.device}; they must be on one device")
    if rows is not None:
        if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
            raise TypeError(f"rows is {rows.dtype}; it must be an integer tensor of row numbers")
        if rows.device != h.device:
            raise ValueError(f"rows is on {rows.device} and h on {h.device}; they must be on one device")


def explained(error: RuntimeError, h: Tensor, w: Weights, rows: Tensor | None = None) -> Exception:
    """What to raise for an op's refusal: the sentence of :func:`check`, else the op's own.

    An edit of a few rows costs less than Python's checks of its arguments would, so the ops check theirs in C++; the
    sentence is looked for where they refuse.
    """
    if "rows: " in str(error):
        return IndexError(sentence(error))
    check(h, w, rows)
    return error


def sentence(error: RuntimeError) -> str:
    """The message of a native check, without the function, file and line before it."""
    return re.sub(r"^.*?\.(cpp|h|inl):\d+, ", "", str(error).partition("\n")[0])


def as_index(rows: Tensor) -> Tensor:
    if rows.dtype is torch.int64 and rows.dim() == 1 and rows.is_contiguous():
        return rows
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise TypeError(f"rows is {rows.dtype}; it must be an integer tensor of row numbers")
    return rows.reshape(-1).to(torch.int64).contiguous()


def listed(rows: Tensor, unique: bool) -> Tensor:
    """The rows as the ops take them. A GPU's threads cannot see that a row is listed twice, so there all but one go."""
    rows = as_index(rows)
    return rows if unique or not rows.is_cuda else each_once(rows)


def each_once(rows: Tensor) -> Tensor:
    """rows (n,) in ascending order, -1 for those that come again."""
    rows = rows.sort().values
    again = torch.zeros_like(rows, dtype=torch.bool)
    again[1:] = rows[1:] == rows[:-1]
    return rows.masked_fill(again, -1)
