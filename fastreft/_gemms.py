"""The edit by matrix products: for a GPU and ranks beyond what its fused kernels take, where the products are compute bound."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, addmm

MOST_FUSED = 64  # the largest rank of the tensor-core kernels, kMaxFusedRank in csrc/policy.h


def edit(
    h: Tensor,
    U: Tensor,
    V: Tensor | None,
    P: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    act: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """h (..., d) + U^T (act(V h + b) - P h - c) in h's dtype, differentiated by torch; V - P is formed from the masters."""
    if act is None and V is not None and P is not None:
        V, P = V - P, None
    x = h.reshape(-1, h.shape[-1])
    z = x.new_zeros(x.shape[0], U.shape[0]) if V is None else x @ V.to(h.dtype).T
    if b is not None:
        z = z + b.to(h.dtype)
    if act is not None:
        z = act(z)
    if P is not None:
        z = z - x @ P.to(h.dtype).T
    if c is not None:
        z = z - c.to(h.dtype)
    return addmm(x, z, U.to(h.dtype)).view(h.shape)
