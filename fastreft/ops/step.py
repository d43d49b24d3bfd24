"""The native ops of lists of parameters, retraction and the optimizer step: what is asked before them, and on which device."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import reference
from . import native
from .checks import FLOATS, sentence


def check_matrices(matrices: Sequence[Tensor]) -> None:
    """``ValueError`` naming the matrix that is not (r, d) with r <= d, ``TypeError`` for its dtype."""
    for i, R in enumerate(matrices):
        if R.dim() != 2 or R.shape[0] > R.shape[1]:
            raise ValueError(f"matrices[{i}] is {tuple(R.shape)}; it must be (r, d) with r <= d")
        if R.dtype not in FLOATS:
            raise TypeError(f"matrices[{i}] is {R.dtype}; it must be float32, bfloat16, float16 or float64")


def capturing(t: Tensor) -> bool:
    """Is what happens to t being captured in a CUDA graph, where nothing can be asked of the GPU?"""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def by_device(tensors: list[Tensor]) -> list[list[int]]:
    """The places of the tensors of each device, in the order they are listed."""
    places: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        places.setdefault(t.device, []).append(i)
    return list(places.values())


def retract_(matrices: list[Tensor]) -> None:
    """Orthonormal rows for each matrix, native where there is a core for all; see :func:`fastreft.functional.retract_`."""
    check_matrices(matrices)
    if not matrices or not all(native.runs(R) for R in matrices):
        return reference.retract_(matrices)
    matrices = [R.detach() for R in matrices]
    devices = by_device(matrices)
    for places in devices:
        # On one CPU the op looks for itself; in a captured graph the kernel leaves a matrix alone that is not finite.
        first = matrices[places[0]]
        if capturing(first) or (first.is_cpu and len(devices) == 1):
            continue
        norms = torch._foreach_norm([matrices[i] for i in places], float("inf"))
        finite = torch.stack([norm.isfinite() for norm in norms]).tolist()
        if not all(finite):
            raise ValueError(f"matrices[{places[finite.index(False)]}] holds a value that is not finite")
    targets = [R if R.is_contiguous() else R.contiguous() for R in matrices]
    for places in devices:
        try:
            torch.ops.fastreft.retract_.default([targets[i] for i in places])
        except RuntimeError as error:
            raise ValueError(sentence(error)) from None
    increment_version(matrices)
    for R, target in zip(matrices, targets, strict=True):
        if R is not target:
            R.copy_(target)


def step_(params, grads, m, v, ages: list[Tensor], live_lr: Tensor | None, rotations: int, settings) -> Tensor | None:
    """One optimizer step, of which the first ``rotations`` parameters are Rs. On a GPU: what became of each parameter, int32
    [len(params)], 2 = left alone as not finite."""
    if not ages and capturing(params[0]):
        raise RuntimeError(
            "an optimizer step is being captured in a CUDA graph, which would repeat its learning rate and its age for ever; "
            "make it with ReftAdamW(..., capturable=True), or take the step outside the graph"
        )
    try:
        if not ages and live_lr is None:
            numbers = (settings[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "r_lr_scale", "age"))
            if native.quick.step_(params, grads, m, v, rotations, *numbers) is not NotImplemented:
                return None
        with torch._C._AutoDispatchBelowAutograd():
            status = torch.ops.fastreft.step_.default(params, grads, m, v, ages, live_lr, rotations, **settings)
    except RuntimeError as error:
        if "not finite" not in str(error):
            raise
        raise FloatingPointError(_refusal(sentence(error), params, grads)) from None
    increment_version(params)
    return status[: 4 * len(params)].view(torch.int32) if status.numel() else None


def _refusal(said: str, params: list[Tensor], grads: list[Tensor]) -> str:
    """Why a step of a parameter was refused: its gradient, its own values, or rows that no retraction makes orthonormal."""
    named = re.search(r"params\[(\d+)\]", said)
    if named is None:
        return said
    i = int(named[1])
    name = f"params[{i}] {tuple(params[i].shape)}"
    if not bool(grads[i].isfinite().all()):
        return f"the gradient of {name} is not finite"
    if not bool(params[i].isfinite().all()):
        return f"{name} holds a value that is not finite"
    if params[i].dim() == 2 and float((params[i] @ params[i].mT).det().abs()) < 1e-6:
        return (
            f"{name} has rows that are zero or dependent, which no step keeps orthonormal; functional.retract_ mends it"
        )
    return f"{name} would get a value that is not finite: the learning rate or the gradient is too large"
