"""The fused edit through torch's dispatcher: the native ops with their gradients, and what torch is told of them.

The ops and their schemas are registered by the extension (``csrc/torch/``) that ``native.py`` loads. What is registered here
is Python's part: shapes for the compiler, autograd, and a refusal where a mutating op would silently give no gradient.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import activations, derivatives, native
from .activations import Activation
from .checks import Weights, explained, listed
from .fakes import FAKES


class _Ops:
    """The entry points of the ops that a forward calls most, looked up once; ``_op`` is what an OpOverload calls."""

    if native.CPU:
        edit_rows_ = torch.ops.fastreft.unguarded_edit_rows_.default._op
        edit_rows_backward_ = torch.ops.fastreft.unguarded_edit_rows_backward_.default._op


def _wants_grad(h: Tensor, w: Weights) -> bool:
    if not torch.is_grad_enabled():
        return False
    return h.requires_grad or any(weight is not None and weight.requires_grad for weight in w)


def _apart(w: Weights) -> tuple[Any, bool]:
    """(U, V, P, b, c) as the ops take them, where a P that is U is left out, and whether it was."""
    U, V, P, b, c = w
    return (U, V, None if P is U else P, b, c), P is U


def edit(h: Tensor, w: Weights, act: Activation) -> Tensor:
    """Every row, a new tensor."""
    weights, tied = _apart(w)
    try:
        return torch.ops.fastreft.edit.default(h, *weights, act.number, tied, _wants_grad(h, w))[0]
    except RuntimeError as error:
        raise explained(error, h, w) from None


def edit_rows(h: Tensor, rows: Tensor, w: Weights, act: Activation, unique: bool) -> Tensor:
    """The listed rows, in a new tensor."""
    weights, tied = _apart(w)
    rows = listed(rows, unique)
    try:
        return torch.ops.fastreft.edit_rows.default(h, rows, *weights, act.number, tied, _wants_grad(h, w))[0]
    except RuntimeError as error:
        raise explained(error, h, w, rows) from None


def edit_rows_(h: Tensor, rows: Tensor, w: Weights, act: Activation, unique: bool) -> Tensor:
    """The listed rows, in place."""
    weights, tied = _apart(w)
    rows = listed(rows, unique)
    try:
        if _wants_grad(h, w):
            apply = _EditRows.apply if torch._C._are_functorch_transforms_active() else _apply_edit_rows
            return apply(h, rows, *weights, act.number, tied)
        _Ops.edit_rows_(h, rows, *weights, act.number, tied, False)
        if not h.is_inference():
            increment_version(h)
        return h
    except RuntimeError as error:
        raise explained(error, h, w, rows) from None


# ---- gradients -----------------------------------------------------------------------------------------------------


def _present(gradient: Tensor, weight: Tensor | None) -> Tensor | None:
    return None if weight is None else gradient


def _holders(g: Tensor) -> tuple[int, int, int]:
    """How many hold this gradient: as a Python object, as a tensor, as memory."""
    memory: Any = g.untyped_storage()
    tensor: Any = g
    return sys.getrefcount(g), tensor._use_count(), torch._C._storage_Use_Count(memory._cdata)


class _Probe(torch.autograd.Function):
    """Learns what :func:`_holders` says of a gradient that nobody but its backward holds."""

    alone: tuple[int, int, int] = (0, 0, 0)

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        _Probe.alone = _holders(g)
        return g


def _learn_holders() -> None:
    with torch.enable_grad():
        x = torch.ones(1, requires_grad=True)
        (_Probe.apply(x) * 2.0).sum().backward()


class _EditRows(torch.autograd.Function):
    """In place: what ``register_autograd`` does not do for an op that mutates its argument."""

    @staticmethod
    def forward(ctx, h, rows, U, V, P, b, c, act, tied):
        saved, z = _Ops.edit_rows_(h, rows, U, V, P, b, c, act, tied, True)
        ctx.mark_dirty(h)
        ctx.save_for_backward(rows, saved, z, U, V, P, b, c)
        ctx.act, ctx.tied = act, tied
        return h

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled() or derivatives.batched(g):
            return (*_edit_rows_backward(ctx, g, name="edit_rows_")[:-1],)
        rows, saved, z, U, V, P, b, c = ctx.saved_tensors
        need_dh = ctx.needs_input_grad[0]
        # The gradient of the whole state is passed on as it is, save the edited rows. Where nobody else holds it,
        # those rows are changed in place and nothing of size [B*S, d] is copied; else it is copied and edited in one go.
        if need_dh and not (g.is_contiguous() and _holders(g) == _Probe.alone):
            return _edit_rows_gradients(g, rows, saved, z, U, V, P, b, c, ctx.act, ctx.tied)[:-1]
        dU, dV, dP, db, dc = _Ops.edit_rows_backward_(g, rows, saved, z, U, V, P, b, c, ctx.act, ctx.tied, need_dh)
        return (
            *(g if need_dh else None, None, dU, None if V is None else dV, None if P is None else dP),
            *(None if b is None else db, None if c is None else dc, None, None),
        )


# Function.apply looks at every argument for functorch's wrappers first; what it then calls is this.
_apply_edit_rows = super(torch.autograd.Function, _EditRows).apply


def _save_edit(ctx, inputs, output):
    h, U, V, P, b, c, ctx.act, ctx.tied, _ = inputs
    ctx.save_for_backward(h, output[1], U, V, P, b, c)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _edit_backward(ctx, g, _z):
    if g is None:
        return (None,) * 9
    h, z, U, V, P, b, c = ctx.saved_tensors
    if torch.is_grad_enabled() or derivatives.batched(g):  # to be differentiated again, or one of many under vmap
        made = derivatives.gradients(g, h, (U, V, P, b, c), activations.numbered(ctx.act), ctx.tied)
        return (*made, None, None, None)
    need_dh = ctx.needs_input_grad[0]
    dh, dU, dV, dP, db, dc = torch.ops.fastreft.edit_backward.default(
        g, h, z, U, V, P, b, c, ctx.act, ctx.tied, need_dh
    )
    return (
        *(dh if need_dh else None, dU, _present(dV, V), _present(dP, P), _present(db, b), _present(dc, c)),
        *(None, None, None),
    )


def _save_edit_rows(ctx, inputs, output):
    _h, rows, U, V, P, b, c, ctx.act, ctx.tied, _ = inputs
    _out, saved, z = output
    ctx.save_for_backward(rows, saved, z, U, V, P, b, c)
    ctx.mark_non_differentiable(saved, z)
    ctx.set_materialize_grads(False)


def _edit_rows_backward(ctx, g, _saved=None, _z=None, name="edit_rows"):
    if g is None:
        return (None,) * 10
    rows, saved, z, U, V, P, b, c = ctx.saved_tensors
    if derivatives.batched(g):
        w, act = (U, V, P, b, c), activations.numbered(ctx.act)
        dh, *made = derivatives.gradients_of_rows(g, rows, saved, w, act, ctx.tied)
        return (dh, None, *made, None, None, None)
    if not torch.is_grad_enabled():
        return _edit_rows_gradients(g, rows, saved, z, U, V, P, b, c, ctx.act, ctx.tied)
    with torch.no_grad():
        made = _edit_rows_gradients(g, rows, saved, z, U, V, P, b, c, ctx.act, ctx.tied)
    return derivatives.once(name, made, (g, U, V, P, b, c))


def _edit_rows_gradients(g, rows, saved, z, U, V, P, b, c, act, tied):
    """The gradients of edit_rows's ten arguments, g left alone."""
    dh, dU, dV, dP, db, dc = torch.ops.fastreft.edit_rows_backward.default(g, rows, saved, z, U, V, P, b, c, act, tied)
    return (
        *(dh, None, dU, _present(dV, V), _present(dP, P), _present(db, b), _present(dc, c)),
        *(None, None, None),
    )


# ---- registration ---------------------------------------------------------------------------------------------------


def _refuse_gradients(op):
    """Called under grad, a mutating op would silently give no gradient: it raises instead."""

    def guarded(keys, *args):
        tensors = [
            a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(a, Tensor)
        ]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(
                f"{op} mutates its argument and has no gradient of its own, and an argument requires one; "
                "call the form in fastreft.functional, or run it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return guarded


def _register() -> None:
    ops = torch.ops.fastreft
    for name, fake in FAKES.items():
        torch.library.register_fake(f"fastreft::{name}", fake)
    torch.library.register_autograd("fastreft::edit", _edit_backward, setup_context=_save_edit)
    torch.library.register_autograd("fastreft::edit_rows", _edit_rows_backward, setup_context=_save_edit_rows)
    for name in ("edit_rows_", "edit_rows_backward_", "edit_pooled_", "retract_", "step_"):
        _library.impl(name, _refuse_gradients(getattr(ops, name).default), "Autograd", with_keyset=True)
    for name in ("unguarded_edit_rows_", "unguarded_edit_rows_backward_"):
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


if native.BACKEND == "native":
    _library = torch.library.Library("fastreft", "IMPL")
    _register()
    _learn_holders()
