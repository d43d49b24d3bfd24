"""The one place that decides how an edit is computed. :mod:`fastreft.functional`, the modules and the hooks all come here.

Five ways, asked in this order:

    transformed  the oracle, without a look at a value: within torch.func's transforms and forward-mode derivatives, which know
             torch's own ops alone

    quick    csrc/quick/: rows in place, autograd included, past torch's dispatcher; for the torch that built it. It decides
             for itself, in C++, as a question in Python costs what it saves
    plain    the oracle (``fastreft/reference.py``), differentiated by torch: no core for this device, or no kernel has the
             activation
    gemms    matrix products (``gemms.py``): a GPU, and a rank beyond what its fused kernels take
    fused    the native ops (``autograd.py``), through the dispatcher
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from . import activations, autograd, checks, gemms, native
from .activations import ActFn, Activation
from .checks import Weights

LINEAR = activations.find(None)
NEW, IN_PLACE, WHERE_ALLOWED = "new", "in place", "in place where autograd allows it, else new"


class Way(NamedTuple):
    """A way to compute an edit: of every row, and of listed rows in a new tensor or in place."""

    dense: Callable[[Tensor, Weights, Activation], Tensor]
    rows: Callable[[Tensor, Tensor, Weights, Activation, bool], Tensor]
    rows_: Callable[[Tensor, Tensor, Weights, Activation, bool], Tensor]


def edit(
    h: Tensor, w: Weights, act_fn: ActFn, rows: Tensor | None = None, where: str = NEW, unique: bool = False
) -> Tensor:
    """h + U^T (act(V h + b) - P h - c): h (..., d), its shape and dtype.

    ``rows`` (n,) are rows of h.reshape(-1, d), -1 = skip; None for every row, which is always a new tensor. ``where`` says
    whether listed rows are edited in h itself or in a copy. ``unique`` promises that no row is listed twice, which saves a GPU
    the looking.
    """
    act = LINEAR if act_fn is None else activations.find(act_fn)  # a call more would be a twentieth of a small edit
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _transformed(h, w, act, rows, where)
    if rows is None:
        return way_of(h, w, act).dense(h, w, act)
    if where is not NEW:
        number = act[0]
        if number is not None:
            try:
                done = native.quick.edit_rows_(h, rows, *w, number, unique)
            except RuntimeError as error:
                raise checks.explained(error, h, w, rows) from None
            if done is not NotImplemented:
                return done
        where = settled(where, h)
    way = way_of(h, w, act)
    return (way.rows if where is NEW else way.rows_)(h, rows, w, act, unique)


def interchange(
    h: Tensor,
    s: Tensor,
    R: Tensor | None,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    where: str = NEW,
) -> Tensor:
    """h + R^T (mask * (R s - R h)), or s for an R that is None; of every row, or of the listed ones, for which s has a row
    each.

    As s - y with x = s - h and y = x - R^T (mask * R x), which is an edit of x, in fp32 at least: the kernels and the gradients
    are an edit's. A row whose source is itself stays the same to the bit.
    """
    if rows is not None:
        return _interchange_rows(h, s, R, mask, rows, where)
    if s.shape != h.shape:
        raise ValueError(f"s is {tuple(s.shape)}; it must have the shape of h, {tuple(h.shape)}")
    if R is None:
        return s.to(h.dtype)
    dtype = torch.promote_types(torch.promote_types(h.dtype, s.dtype), torch.float32)
    s = s.to(dtype)
    U = R if mask is None else mask[:, None] * R
    return (s - edit(s - h.to(dtype), (U, None, R, None, None), None)).to(h.dtype)


def _interchange_rows(h: Tensor, s: Tensor, R: Tensor | None, mask: Tensor | None, rows: Tensor, where: str) -> Tensor:
    flat, rows = h.reshape(-1, h.shape[-1]), rows.reshape(-1)
    if s.shape != (len(rows), h.shape[-1]):
        raise ValueError(f"s is {tuple(s.shape)}; it must have a row for each that is listed, {len(rows), h.shape[-1]}")
    listed = rows >= 0
    if not bool(listed.all()):
        rows, s = rows[listed], s[listed]
    new = interchange(flat[rows], s, R, mask)
    if settled(where, h) is NEW:
        return flat.index_copy(0, rows, new).view(h.shape)
    if not h.is_contiguous():
        return h.copy_(flat.index_copy(0, rows, new).view(h.shape))
    flat.index_copy_(0, rows, new)
    return h


def _transformed(h: Tensor, w: Weights, act: Activation, rows: Tensor | None, where: str) -> Tensor:
    """The edit of every row, of which the listed ones are taken: rows may be one of many under vmap, so none is looked at."""
    checks.check(h, w, rows)
    edited = reference.edit(h, *w, act.function)
    if rows is None:
        return edited
    flat = h.reshape(-1, h.shape[-1])
    chosen = (torch.arange(flat.shape[0], device=h.device) == rows.reshape(-1, 1)).any(0)
    edited = torch.where(chosen[:, None], edited.reshape(flat.shape), flat).reshape(h.shape)
    return h.copy_(edited) if where is IN_PLACE else edited


def way_of(h: Tensor, w: Weights, act: Activation) -> Way:
    """The way of an edit that is not for csrc/quick/."""
    no_kernel_has_the_activation = act.number is None
    if no_kernel_has_the_activation or not native.runs(h):
        return PLAIN
    beyond_the_fused_kernels = gemms.takes(h, w[0])
    return GEMMS if beyond_the_fused_kernels else FUSED


def settled(where: str, h: Tensor) -> str:
    """``where`` as NEW or IN_PLACE. Scattered memory is edited in a copy, too, where that is allowed."""
    if where is not WHERE_ALLOWED:
        return where
    return NEW if not h.is_contiguous() or _autograd_refuses(h) else IN_PLACE


def _autograd_refuses(h: Tensor) -> bool:
    """Would autograd refuse to change it in place, as it does a leaf or one of several views?"""
    if not torch.is_grad_enabled():
        return False
    base = h
    if h._is_view():
        if torch._C._autograd._get_creation_meta(h) != torch._C._autograd.CreationMeta.DEFAULT:
            return True
        base = h._base  # type: ignore[assignment]
    return base.is_leaf and base.requires_grad


def _plain(h: Tensor, w: Weights, act: Activation) -> Tensor:
    checks.check(h, w)
    return reference.edit(h, *w, act.function)


def _plain_rows(h: Tensor, rows: Tensor, w: Weights, act: Activation, unique: bool) -> Tensor:
    checks.check(h, w, rows)
    return reference.edit_rows(h, rows, *w, act.function)


def _plain_rows_(h: Tensor, rows: Tensor, w: Weights, act: Activation, unique: bool) -> Tensor:
    checks.check(h, w, rows)
    return reference.edit_rows_(h, rows, *w, act.function)


PLAIN = Way(_plain, _plain_rows, _plain_rows_)
GEMMS = Way(gemms.edit, gemms.edit_rows, gemms.edit_rows_)
FUSED = Way(autograd.edit, autograd.edit_rows, autograd.edit_rows_)
