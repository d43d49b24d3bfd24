"""The edit by matrix products: for a GPU and ranks beyond what its fused kernels take, where the products are compute bound."""

from __future__ import annotations

import torch
from torch import Tensor, addmm

from . import checks
from .activations import Activation
from .checks import Weights

MOST_FUSED = 64  # the largest rank of the tensor-core kernels, kMaxFusedRank in csrc/cuda/policy.h


def takes(h: Tensor, U: Tensor) -> bool:
    """Is an edit of h with U (r, d) done by these functions?"""
    return h.is_cuda and U.dim() == 2 and U.shape[0] > MOST_FUSED


def edit(h: Tensor, w: Weights, act: Activation) -> Tensor:
    """h (..., d) + U^T (act(V h + b) - P h - c) in h's dtype, differentiated by torch; V - P is formed from the masters."""
    checks.check(h, w)
    U, V, P, b, c = w
    if act.function is None and V is not None and P is not None:
        V, P = V - P, None
    x = h.reshape(-1, h.shape[-1])
    z = x.new_zeros(x.shape[0], U.shape[0]) if V is None else x @ V.to(h.dtype).T
    if b is not None:
        z = z + b.to(h.dtype)
    if act.function is not None:
        z = act.function(z)
    if P is not None:
        z = z - x @ P.to(h.dtype).T
    if c is not None:
        z = z - c.to(h.dtype)
    return addmm(x, z, U.to(h.dtype)).view(h.shape)


def edit_rows(h: Tensor, rows: Tensor, w: Weights, act: Activation, unique: bool) -> Tensor:
    """:func:`edit_rows_` on a copy."""
    return edit_rows_(h.clone(), rows, w, act, unique)


def edit_rows_(h: Tensor, rows: Tensor, w: Weights, act: Activation, unique: bool) -> Tensor:
    """:func:`edit` on the listed rows of h.reshape(-1, d), in place; ``unique`` promises that none is listed twice.

    -1 and rows past the end are skipped. Nothing here waits for the GPU: an entry that is skipped stands in for the first
    that is not and writes the very same row again, or, where all are, writes a row as it was.
    """
    checks.check(h, w, rows)
    rows = checks.listed(rows, unique)
    if h.numel() == 0:
        return h
    if rows.numel() == 0:  # the weights still get their zeros
        rows = rows.new_full((1,), -1)
    if not h.is_contiguous():
        return h.copy_(edit_rows_(h.contiguous(), rows, w, act, True))
    flat = h.view(-1, h.shape[-1])
    live = (rows >= 0) & (rows < flat.shape[0])
    place = torch.arange(len(rows), device=rows.device)
    first = live.int().argmax()  # 0 where none is live
    stands_for = torch.where(live, place, first)
    at = rows[stands_for].clamp(0, flat.shape[0] - 1)
    old = flat[at]
    some = live.any()
    new = torch.where(some, edit(torch.where(some, old, 0), w, act), old)
    # Only an entry that writes for itself hands on a gradient.
    own = (stands_for == place)[:, None]
    flat.index_copy_(0, at, torch.where(own, new, new.detach()[stands_for]))
    return h
