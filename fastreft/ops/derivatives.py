"""The gradients of an edit in torch's own ops: what is differentiated again, or computed for many gradients at once.

With g = d loss / d out, z = act(V h + b) - P h - c, gz = U g and gp = gz * act'(V h + b):

    dh = g + V^T gp - P^T gz;  dV = sum gp h^T;  db = sum gp;  dP = -sum gz h^T;  dU = sum z g^T;  dc = -sum gz

and for a P that is U, dU takes dP as well. The fused backward (csrc/) is the same for one gradient, which ends there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .activations import Activation
from .checks import Weights

Gradients = tuple[Tensor | None, ...]

NO_SECOND = (
    "fastreft.functional.{} has no second derivative: the rows that it edits are all it keeps of the hidden state; "
    "differentiate functional.edit (positions='all') twice, or set FASTREFT_BACKEND=reference"
)


def batched(g: Tensor) -> bool:
    """Does a gradient stand for many, as vmap makes them? There are two kinds: torch.func's, and that of is_grads_batched."""
    return torch._C._functorch.is_batchedtensor(g) or torch._C._functorch.is_legacy_batchedtensor(g)


def gradients(g: Tensor, h: Tensor, w: Weights, act: Activation, tied: bool) -> Gradients:
    """The gradients of h (..., d), U, V, P, b and c of the edit of every row; None for a weight that is none."""
    U, V, P, b, c = w
    if tied:
        P = U
    wide = h.dtype
    for weight in w:
        if weight is not None:
            wide = torch.promote_types(wide, weight.dtype)
    x, gx = h.to(wide).reshape(-1, h.shape[-1]), g.to(wide).reshape(-1, h.shape[-1])
    Uw, Vw, Pw = (None if m is None else m.to(wide) for m in (U, V, P))
    before = x.new_zeros(x.shape[0], U.shape[0]) if Vw is None else x @ Vw.T
    before = before if b is None else before + b.to(wide)
    gz = gx @ Uw.T  # type: ignore[union-attr]
    if act.function is None:
        z, gp = before, gz
    else:
        z, backward = torch.func.vjp(act.function, before)  # type: ignore[misc]
        (gp,) = backward(gz)
    dh = gx
    if Vw is not None:
        dh = dh + gp @ Vw
    if Pw is not None:
        z, dh = z - x @ Pw.T, dh - gz @ Pw
    z = z if c is None else z - c.to(wide)
    dU, dP = z.T @ gx, None if Pw is None else -(gz.T @ x)
    if tied:
        dU, dP = dU + dP, None  # type: ignore[operator]
    made = (
        dU,
        None if V is None else gp.T @ x,
        dP,
        None if b is None else gp.sum(0),
        None if c is None else -gz.sum(0),
    )
    of = [None if m is None or t is None else m.to(t.dtype) for m, t in zip(made, w, strict=True)]
    return dh.reshape(h.shape).to(h.dtype), *of


def gradients_of_rows(g: Tensor, rows: Tensor, before: Tensor, w: Weights, act: Activation, tied: bool) -> Gradients:
    """Those of the edit of listed rows, of which ``before`` (n, d) is what they were; g is of the whole hidden state."""
    place = torch.arange(rows.shape[0], device=rows.device)
    first = (rows[:, None] == rows).int().argmax(1) == place  # a row listed twice is edited once
    own = (rows >= 0) & first
    flat = g.reshape(-1, g.shape[-1])
    at = rows[own]
    dh, *made = gradients(flat[at], before[own].to(g.dtype), w, act, tied)
    return flat.index_copy(0, at, dh).reshape(g.shape), *made  # type: ignore[arg-type]


class _Once(torch.autograd.Function):
    """Hands gradients on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> Any:
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(NO_SECOND.format(ctx.name))


def once(name: str, made: Sequence[Tensor | None], of: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients ``made`` of what ``of`` holds, which say that they cannot be differentiated again where somebody tries."""
    tensors = [t for t in made if t is not None]
    handed = iter(_Once.apply(name, len(tensors), *tensors, *(t for t in of if t is not None)))
    return tuple(None if t is None else next(handed) for t in made)
