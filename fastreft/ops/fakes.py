"""The ops' fake kernels: shapes and dtypes without work, for ``torch.compile`` and ``opcheck``.

Each follows the schema of its op in ``csrc/torch/``, argument by argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _kept(h: Tensor, U: Tensor, act: int, n, save: bool) -> Tensor:
    dtype = torch.float64 if h.dtype is torch.float64 else torch.float32
    return h.new_empty((n if save else 0, U.shape[0] * (1 if act == 0 else 2)), dtype=dtype)


def _rows_in(h: Tensor):
    n = 1
    for size in h.shape[:-1]:
        n = n * size
    return n


def _like(weight: Tensor | None, U: Tensor) -> Tensor:
    return U.new_empty((0,)) if weight is None else weight.new_empty(weight.shape)


def _fake_edit(h, U, V, P, b, c, act, tied, save):
    return h.new_empty(h.shape), _kept(h, U, act, _rows_in(h), save)


def _fake_edit_rows_(h, rows, U, V, P, b, c, act, tied, save):
    n = rows.shape[0]
    return h.new_empty((n if save else 0, h.shape[-1])), _kept(h, U, act, n, save)


def _fake_edit_rows(h, rows, U, V, P, b, c, act, tied, save):
    return h.new_empty(h.shape), *_fake_edit_rows_(h, rows, U, V, P, b, c, act, tied, save)


def _fake_edit_backward(g, h, z, U, V, P, b, c, act, tied, need_dh):
    dh = h.new_empty(h.shape) if need_dh else h.new_empty((0,))
    return dh, *(_like(weight, U) for weight in (U, V, P, b, c))


def _fake_edit_rows_backward_(g, rows, saved, z, U, V, P, b, c, act, tied, need_dh):
    return tuple(_like(weight, U) for weight in (U, V, P, b, c))


def _fake_edit_rows_backward(g, rows, saved, z, U, V, P, b, c, act, tied):
    return g.new_empty(g.shape), *(_like(weight, U) for weight in (U, V, P, b, c))


def _fake_edit_pooled_(h, rows, adapters, A, U, b, c, table, most_r):
    return None


def _fake_matrices(matrices, *rest):
    return matrices[0].new_empty((0,), dtype=torch.uint8)


def _fake_prompt_rows(mask, labels, batch, length, first, last, pyreft_compat):
    return torch.empty((batch, first + last), dtype=torch.int64)


FAKES: dict[str, Callable[..., Any]] = {
    "edit": _fake_edit,
    "edit_rows_": _fake_edit_rows_,
    "unguarded_edit_rows_": _fake_edit_rows_,
    "edit_rows": _fake_edit_rows,
    "edit_backward": _fake_edit_backward,
    "edit_rows_backward_": _fake_edit_rows_backward_,
    "unguarded_edit_rows_backward_": _fake_edit_rows_backward_,
    "edit_rows_backward": _fake_edit_rows_backward,
    "edit_pooled_": _fake_edit_pooled_,
    "retract_": _fake_matrices,
    "step_": _fake_matrices,
    "prompt_rows": _fake_prompt_rows,
}
