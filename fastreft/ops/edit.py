"""The native ops: argument checks, fake kernels and autograd. :mod:`fastreft.functional` is the public face.

The ops and their schemas are registered by the extension (``csrc/ops*.cpp``) that ``_native.py`` loads.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from . import native as _native
from .fakes import FAKES

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- checks: one sentence, before any work ------------------------------------------------------------------------


def check(
    h: Tensor,
    U: Tensor,
    V: Tensor | None = None,
    P: Tensor | None = None,
    b: Tensor | None = None,
    c: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """``TypeError`` or ``ValueError`` naming the argument, what came and what was wanted."""
    if h.dtype not in FLOATS:
        raise TypeError(f"h is {h.dtype}; it must be float32, bfloat16, float16 or float64")
    if h.dim() == 0:
        raise ValueError("h is a scalar; it must be (..., d)")
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


class _Native:
    """The ops' entry points, looked up once; ``_op`` is what an OpOverload calls."""

    if _native.CPU:
        edit_rows_ = torch.ops.fastreft.unguarded_edit_rows_.default._op
        edit_rows_backward_ = torch.ops.fastreft.unguarded_edit_rows_backward_.default._op
        prompt_rows = torch.ops.fastreft.prompt_rows.default._op


# ---- what functional.py calls --------------------------------------------------------------------------------------
#
# An edit of a few rows costs less than Python's checks of its arguments would. The ops check theirs in C++; where they
# refuse, explained() finds the sentence.


def _wants_grad(h, U, V, P, b, c) -> bool:
    return torch.is_grad_enabled() and (
        h.requires_grad
        or U.requires_grad
        or (V is not None and V.requires_grad)
        or (P is not None and P.requires_grad)
        or (b is not None and b.requires_grad)
        or (c is not None and c.requires_grad)
    )


def _index(rows: Tensor) -> Tensor:
    if rows.dtype is torch.int64 and rows.dim() == 1 and rows.is_contiguous():
        return rows
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise TypeError(f"rows is {rows.dtype}; it must be an integer tensor of row numbers")
    return rows.reshape(-1).to(torch.int64).contiguous()


def listed(rows: Tensor, unique: bool) -> Tensor:
    """The rows as the ops take them. A GPU's threads cannot see that a row is listed twice, so there all but one go."""
    rows = _index(rows)
    return rows if unique or not rows.is_cuda else each_once(rows)


def each_once(rows: Tensor) -> Tensor:
    """rows (n,) in ascending order, -1 for those that come again."""
    rows = rows.sort().values
    again = torch.zeros_like(rows, dtype=torch.bool)
    again[1:] = rows[1:] == rows[:-1]
    return rows.masked_fill(again, -1)


def explained(error: RuntimeError, h, U, V, P, b, c, rows=None) -> Exception:
    """What to raise for an op's refusal: the sentence of :func:`check`, else the op's own."""
    if "rows: " in str(error):
        return IndexError(sentence(error))
    check(h, U, V, P, b, c, rows)
    return error


def sentence(error: RuntimeError) -> str:
    """The message of a native check, without the function, file and line before it."""
    return re.sub(r"^.*?\.cpp:\d+, ", "", str(error).partition("\n")[0])


def edit(h, U, V, P, b, c, act: int) -> Tensor:
    save, tied = _wants_grad(h, U, V, P, b, c), P is U
    try:
        return torch.ops.fastreft.edit.default(h, U, V, None if tied else P, b, c, act, tied, save)[0]
    except RuntimeError as error:
        raise explained(error, h, U, V, P, b, c) from None


def edit_rows(h, rows, U, V, P, b, c, act: int, unique: bool) -> Tensor:
    save, tied = _wants_grad(h, U, V, P, b, c), P is U
    rows = listed(rows, unique)
    try:
        return torch.ops.fastreft.edit_rows.default(h, rows, U, V, None if tied else P, b, c, act, tied, save)[0]
    except RuntimeError as error:
        raise explained(error, h, U, V, P, b, c, rows) from None


def quick_edit_rows_(h, rows, U, V, P, b, c, act: int, unique: bool) -> Any:
    """:func:`edit_rows_` in C++ and past the dispatcher; ``NotImplemented``, with nothing done, where that is not for it."""
    try:
        return _native.quick.edit_rows_(h, rows, U, V, P, b, c, act, unique)
    except RuntimeError as error:
        raise explained(error, h, U, V, P, b, c, rows) from None


def edit_rows_(h, rows, U, V, P, b, c, act: int, unique: bool) -> Tensor:
    tied = P is U
    own_P = None if tied else P
    rows = listed(rows, unique)
    try:
        if _wants_grad(h, U, V, P, b, c):
            apply = _EditRows.apply if torch._C._are_functorch_transforms_active() else _apply_edit_rows
            return apply(h, rows, U, V, own_P, b, c, act, tied)
        _Native.edit_rows_(h, rows, U, V, own_P, b, c, act, tied, False)
        if not h.is_inference():
            increment_version(h)
        return h
    except RuntimeError as error:
        raise explained(error, h, U, V, P, b, c, rows) from None


_HOST = torch.device("cpu")
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _readable(t: Tensor | None) -> bool:
    """Can csrc/positions_cpu.cpp read it, or is there nothing to read?"""
    return t is None or (t.is_cpu and t.dtype in _INTEGERS)


def finds_rows(mask: Tensor | None, labels: Tensor | None, device: torch.device) -> bool:
    """Does the native op find the rows of such a batch? On a CPU, and outside a graph, where the compiler fuses torch's."""
    here = _native.CPU and device == _HOST and not torch.compiler.is_compiling()  # device.type costs more than a row
    return here and _readable(mask) and _readable(labels)


def prompt_rows(mask, labels, batch: int, length: int, first: int, last: int, pyreft_compat: bool) -> Tensor:
    """The rows of fN+lM in a padded batch (csrc/positions.h): int64 (batch, first + last), -1 = skip."""
    found = _native.quick.prompt_rows(mask, labels, batch, length, first, last, pyreft_compat)
    if found is not NotImplemented:
        return found
    return _Native.prompt_rows(mask, labels, batch, length, first, last, pyreft_compat)


def hidden_sample(mask: Tensor) -> int:
    """The first sample of which mask (B, S) shows no token; -1 where there is none."""
    found = _native.quick.hidden_sample(mask)
    if found is not NotImplemented:
        return found
    if (
        _native.CPU and _readable(mask) and type(mask) is Tensor
    ):  # a subclass may have no address, as fake tensors have none
        return _native.core.hidden_sample(mask.data_ptr(), mask.element_size(), *mask.shape, *mask.stride())
    shown = mask.any(1)
    return -1 if bool(shown.all()) else int(shown.int().argmin())


# ---- autograd ------------------------------------------------------------------------------------------------------


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
        saved, z = _Native.edit_rows_(h, rows, U, V, P, b, c, act, tied, True)
        ctx.mark_dirty(h)
        ctx.save_for_backward(rows, saved, z, U, V, P, b, c)
        ctx.act, ctx.tied = act, tied
        return h

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # create_graph: a copy, and an error when it is differentiated again
            return _edit_rows_once(ctx, g)
        rows, saved, z, U, V, P, b, c = ctx.saved_tensors
        need_dh = ctx.needs_input_grad[0]
        # The gradient of the whole state is passed on as it is, save the edited rows. Where nobody else holds it,
        # those rows are changed in place and nothing of size [B*S, d] is copied; else it is copied and edited in one go.
        if need_dh and not (g.is_contiguous() and _holders(g) == _Probe.alone):
            return _edit_rows_gradients(g, rows, saved, z, U, V, P, b, c, ctx.act, ctx.tied)[:-1]
        dU, dV, dP, db, dc = _Native.edit_rows_backward_(g, rows, saved, z, U, V, P, b, c, ctx.act, ctx.tied, need_dh)
        return (
            *(g if need_dh else None, None, dU, None if V is None else dV, None if P is None else dP),
            *(None if b is None else db, None if c is None else dc, None, None),
        )


@once_differentiable
def _edit_rows_once(ctx, g):
    rows, saved, z, U, V, P, b, c = ctx.saved_tensors
    return _edit_rows_gradients(g, rows, saved, z, U, V, P, b, c, ctx.act, ctx.tied)[:-1]


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


def _edit_rows_backward(ctx, g, _saved, _z):
    if g is None:
        return (None,) * 10
    rows, saved, z, U, V, P, b, c = ctx.saved_tensors
    return _edit_rows_gradients(g, rows, saved, z, U, V, P, b, c, ctx.act, ctx.tied)


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
    for name in ("edit_rows_", "edit_rows_backward_", "retract_", "step_"):
        _library.impl(name, _refuse_gradients(getattr(ops, name).default), "Autograd", with_keyset=True)
    for name in ("unguarded_edit_rows_", "unguarded_edit_rows_backward_"):
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


if _native.BACKEND == "native":
    _library = torch.library.Library("fastreft", "IMPL")
    _register()
    _learn_holders()
