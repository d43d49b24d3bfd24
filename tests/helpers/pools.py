"""Pools of adapters of every kind, and what each does by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreft import reference
from fastreft.ops import activations
from fastreft.ops.pooled import Pool, pool_of

# (rank, activation, which of V, P, b, c there are, whether P is U)
KINDS = (
    (4, None, "VPb", True),  # LoReFT
    (3, "silu", "VPb", True),  # with an activation: V and P apart
    (8, None, "VPbc", False),  # NoReFT with its bias
    (1, None, "Vb", False),  # DiReFT
    (6, None, "Pb", True),  # ConsReFT
    (2, None, "b", False),  # LobiReFT
    (5, "gelu", "Vb", False),
)


def adapters(d: int, seed: int = 0):
    """(weights, activation) of an adapter of every kind."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / d**0.5

    made = []
    for r, act, parts, tied in KINDS:
        r = min(r, d)
        U = normal(r, d)
        P = (U if tied else normal(r, d)) if "P" in parts else None
        V = normal(r, d) if "V" in parts else None
        b, c = (normal(r) if name in parts else None for name in "bc")
        made.append(((U, V, P, b, c), activations.find(act)))
    return made


def pool(d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Pool:
    return pool_of(adapters(d, seed), dtype)


def expected(h: Tensor, rows: Tensor, which: Tensor, made, dtype: torch.dtype | None = None) -> Tensor:
    """The rows edited one by one by their own adapters, in ``dtype``; h's where not given."""
    out = h.to(dtype or h.dtype).clone()
    flat = out.view(-1, h.shape[-1])
    for row, adapter in zip(rows.tolist(), which.tolist(), strict=True):
        if 0 <= row < len(flat) and 0 <= adapter < len(made):
            w, act = made[adapter]
            w = [None if t is None else t.to(dtype or t.dtype) for t in w]
            flat[row] = reference.edit(flat[row], *w, act.function)
    return out
