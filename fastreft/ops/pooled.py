"""Rows of many adapters in one call: the adapters' weights lie in one pool, and a table says where whose do. Inference only.

An adapter edits a row as it does alone, whatever the rows beside it; on a CPU the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import activations, native
from .activations import Activation
from .checks import Weights

CONSTANT, TOGETHER, APART = FORMS = (0, 1, 2)  # how z comes about, as Form in csrc/edit.h


class Pool(NamedTuple):
    """``A`` and ``U`` (vectors, d), ``b`` and ``c`` (vectors,) or None, all of one dtype; ``table`` int32 (adapters, 4): an
    adapter's first vector, its r (0: it edits nothing), the number of its activation, and its form:

        0   z = act(b) - c      1   z = act(A h + b) - c      2   z = act(V h + b) - P h - c

    V being r vectors of A, and P the r behind them. ``most_r``: no r is larger.
    """

    A: Tensor
    U: Tensor
    b: Tensor | None
    c: Tensor | None
    table: Tensor
    most_r: int


def form_of(w: Weights, act: Activation) -> int:
    """The form of an adapter: without an activation V - P is one matrix."""
    _, V, P, _, _ = w
    linear = act.number == 0
    if not linear and P is not None:
        return APART
    return CONSTANT if V is None and P is None else TOGETHER


def vectors_of(w: Weights, act: Activation) -> int:
    """How many vectors an adapter takes in a pool."""
    return w[0].shape[0] * (2 if form_of(w, act) == APART else 1)


def put(pool: Pool, adapter: int, first: int, w: Weights, act: Activation) -> None:
    """Write an adapter's weights into a pool, from the vector ``first`` on, and its line of the table last."""
    U, V, P, b, c = w
    r, form = U.shape[0], form_of(w, act)
    own = slice(first, first + r)
    pool.U[own] = U
    if form == APART:
        pool.A[own] = torch.zeros_like(U) if V is None else V
        pool.A[first + r : first + 2 * r] = P  # type: ignore[assignment]  # apart has one
    elif form == TOGETHER:
        dtype = pool.A.dtype
        A = torch.zeros_like(U, dtype=dtype) if V is None else V.to(dtype)
        pool.A[own] = A if P is None else A - P.to(dtype)
    for vector, held in ((b, pool.b), (c, pool.c)):
        if held is not None:
            held[own] = 0 if vector is None else vector
    line = torch.tensor([first, r, act.number, form], dtype=torch.int32)
    pool.table[adapter].copy_(line)


@torch.no_grad()
def pool_of(adapters: Sequence[tuple[Weights, Activation]], dtype: torch.dtype = torch.float32) -> Pool:
    """A pool of adapters for one place of a model, all of one d and device, each activation one that the kernels know."""
    U = adapters[0][0][0]
    total, d = sum(vectors_of(*each) for each in adapters), U.shape[1]
    b, c = (U.new_zeros(total, dtype=dtype) if any(w[i] is not None for w, _ in adapters) else None for i in (3, 4))
    table = torch.zeros(len(adapters), 4, dtype=torch.int32, device=U.device)
    pool = Pool(U.new_zeros(total, d, dtype=dtype), U.new_zeros(total, d, dtype=dtype), b, c, table,
                max(w[0].shape[0] for w, _ in adapters))  # fmt: skip
    first = 0
    for i, (w, act) in enumerate(adapters):
        put(pool, i, first, w, act)
        first += vectors_of(w, act)
    return pool


def edit_pooled_(h: Tensor, rows: Tensor, adapters: Tensor, pool: Pool) -> Tensor:
    """h + U^T z of listed rows in place, each with its own adapter; h.

    ``h`` (..., d); ``rows`` int64 (n,), rows of h.reshape(-1, d), none twice, -1 = skip; ``adapters`` int64 (n,), which of the
    pool's edits the row, -1 = none. On a CPU ``IndexError`` for a row or an adapter that there is not; on a GPU they are
    skipped. It has no gradient: ``RuntimeError`` where one is asked for.
    """
    if not native.runs(h):
        return _plain(h, rows, adapters, pool)
    try:
        torch.ops.fastreft.edit_pooled_(h, rows, adapters, *pool)
    except RuntimeError as error:
        said = str(error)
        if any(word in said for word in ("rows: ", "adapters: ", "table: ")):
            raise IndexError(said.partition("\n")[0]) from None
        raise
    return h


def _plain(h: Tensor, rows: Tensor, adapters: Tensor, pool: Pool) -> Tensor:
    """The same in torch, an adapter at a time."""
    for i in adapters[(rows >= 0) & (adapters >= 0)].unique().tolist():
        first, r, act, form = pool.table[i].tolist()
        if r == 0:
            continue
        own = slice(first, first + r)
        V = None if form == CONSTANT else pool.A[own]
        P = pool.A[first + r : first + 2 * r] if form == APART else None
        b, c = (None if held is None else held[own] for held in (pool.b, pool.c))
        mine = rows.masked_fill(adapters != i, -1)
        reference.edit_rows_(h, mine, pool.U[own], V, P, b, c, activations.numbered(act).function)
    return h
