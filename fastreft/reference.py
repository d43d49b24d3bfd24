"""The oracle: every edit and the retraction in plain torch, a few lines each. Imports torch alone.

Shapes: h (..., d) in any floating dtype; R, P, W (r, d); b, c (r,). The sums run in the promotion of h's and the weights'
dtypes and the result has h's dtype. ``act_fn`` is a function of a tensor, or None for the identity.
Source: ReFT (Wu et al. 2024, arXiv 2404.03592), section 3; NoReFT, ConsReFT and LobiReFT are pyreft's variants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Act = Callable[[Tensor], Tensor] | None


def edit(
    h: Tensor, U: Tensor, V: Tensor | None, P: Tensor | None, b: Tensor | None, c: Tensor | None = None, act: Act = None
) -> Tensor:
    """out = h + U^T (act(V h + b) - P h - c), the one primitive; terms that are None are left out. Shape of h."""
    dtype = h.dtype
    for weight in (U, V, P, b, c):
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    x, U = h.to(dtype), U.to(dtype)
    z = torch.zeros(*h.shape[:-1], U.shape[0], dtype=dtype, device=h.device)
    if V is not None:
        z = x @ V.to(dtype).T
    if b is not None:
        z = z + b.to(dtype)
    if act is not None:
        z = act(z)
    if P is not None:
        z = z - x @ P.to(dtype).T
    if c is not None:
        z = z - c.to(dtype)
    return (x + z @ U).to(h.dtype)


def loreft(h: Tensor, R: Tensor, W: Tensor, b: Tensor, *, act_fn: Act = None) -> Tensor:
    """h + R^T (act(W h + b) - R h), R R^T = I. Paper, equation 2."""
    return edit(h, R, W, R, b, act=act_fn)


def noreft(h: Tensor, P: Tensor, W: Tensor, b: Tensor, c: Tensor | None = None, *, act_fn: Act = None) -> Tensor:
    """h + P^T (act(W h + b) - P h - c), P free."""
    return edit(h, P, W, P, b, c, act=act_fn)


def direft(h: Tensor, R: Tensor, W: Tensor, b: Tensor, *, act_fn: Act = None) -> Tensor:
    """h + R^T act(W h + b), R R^T = I: pyreft's DiReFT."""
    return edit(h, R, W, None, b, act=act_fn)


def nodireft(h: Tensor, P: Tensor, W: Tensor, b: Tensor, *, act_fn: Act = None) -> Tensor:
    """h + P^T act(W h + b), P free: the paper's DiReFT, equation 4."""
    return edit(h, P, W, None, b, act=act_fn)


def consreft(h: Tensor, R: Tensor, b: Tensor) -> Tensor:
    """h + R^T (b - R h), R R^T = I: the subspace is set to a constant."""
    return edit(h, R, None, R, b)


def lobireft(h: Tensor, R: Tensor, b: Tensor) -> Tensor:
    """h + R^T b, R R^T = I: a low-rank bias."""
    return edit(h, R, None, None, b)


def interchange(h: Tensor, s: Tensor, R: Tensor, mask: Tensor | None = None) -> Tensor:
    """h + R^T (mask * (R s - R h)), R R^T = I: in R's subspace h (..., d) takes the coordinates of s (..., d).

    ``mask`` (r,), None for ones. Source: Distributed Alignment Search (Geiger et al. 2023, arXiv 2303.02536), definition 3.3.
    """
    dtype = torch.promote_types(torch.promote_types(h.dtype, s.dtype), R.dtype)
    x, R = h.to(dtype), R.to(dtype)
    z = s.to(dtype) @ R.T - x @ R.T
    if mask is not None:
        z = mask.to(dtype) * z
    return (x + z @ R).to(h.dtype)


def chosen_rows(rows: Tensor, total: int) -> Tensor:
    """The rows an edit touches: negative entries dropped, each row once. Shape (m,), int64, ascending.

    Raises ``IndexError`` for a row past the end.
    """
    rows = rows.reshape(-1)
    if rows.numel() and int(rows.max()) >= total:
        raise IndexError(f"rows: {int(rows.max())} is past the last of {total} rows")
    return torch.unique(rows[rows >= 0])


def edit_rows(
    h: Tensor,
    rows: Tensor,
    U: Tensor,
    V: Tensor | None,
    P: Tensor | None,
    b: Tensor | None,
    c: Tensor | None = None,
    act: Act = None,
) -> Tensor:
    """A copy of h (..., d) in which the listed rows of h.reshape(-1, d) are edited, once each; -1 is skipped."""
    flat = h.reshape(-1, h.shape[-1])
    rows = chosen_rows(rows, flat.shape[0])
    return flat.index_copy(0, rows, edit(flat[rows], U, V, P, b, c, act)).reshape(h.shape)


def edit_rows_(h: Tensor, rows: Tensor, *terms: Any) -> Tensor:
    """:func:`edit_rows` in place, ``terms`` being its arguments after rows; returns h."""
    if not h.is_contiguous():
        return h.copy_(edit_rows(h, rows, *terms))
    flat = h.view(-1, h.shape[-1])
    rows = chosen_rows(rows, flat.shape[0])
    flat.index_copy_(0, rows, edit(flat[rows], *terms))
    return h


@torch.no_grad()
def retract_(matrices: Sequence[Tensor]) -> None:
    """R <- the Q of the QR factorisation of R^T, transposed, with a positive diagonal; in place, in fp64.

    Equal to L^-1 R with R R^T = L L^T (Cholesky) where R has full rank.
    Raises ``ValueError`` naming the first matrix with a value that is not finite; nothing is changed then.
    """
    for i, R in enumerate(matrices):
        if not bool(torch.isfinite(R).all()):
            raise ValueError(f"matrices[{i}] holds a value that is not finite")
    for R in matrices:
        Q, upper = torch.linalg.qr(R.double().T)
        sign = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(Q.dtype)
        R.copy_((Q * sign).T)


@torch.no_grad()
def project_(R: Tensor, G: Tensor) -> None:
    """G <- G - 1/2 (A + A^T) R with A = G R^T, in place: the part of a gradient along the manifold R R^T = I."""
    A = G.double() @ R.double().T
    G.sub_((0.5 * (A + A.T) @ R.double()).to(G.dtype))


@torch.no_grad()
def step_(
    p: Tensor,
    G: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    orthonormal: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    correction1: float,
    correction2: float,
) -> None:
    """One AdamW step of p (any shape; (r, d) with ``orthonormal``) in place, m and v its moments, correction = 1 - beta^t.

    With ``orthonormal``: the gradient is projected first, there is no weight decay, and p is retracted after.
    """
    G = G.double()
    if orthonormal:
        G = G.clone()
        project_(p, G)
    m.copy_(beta1 * m.double() + (1 - beta1) * G)
    v.copy_(beta2 * v.double() + (1 - beta2) * G * G)
    update = lr * (m.double() / correction1) / ((v.double() / correction2).sqrt() + eps)
    if orthonormal:
        p.copy_(p.double() - update)
        retract_([p])
    else:
        p.copy_(p.double() * (1 - lr * weight_decay) - update)
