"""Keeping R orthonormal under any torch optimizer: its gradient is projected before a step, R is retracted after it.

An optimizer that was taught nothing but holds an R (Trainer's own, say) is taught at its first step, see
:func:`guard_optimizers`. The step is that of :mod:`fastreft.optim.adamw`, with the optimizer's own update in Adam's place.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .. import functional, reference
from ..interventions import Intervention, edited_by_rows, orthonormal_parameters
from . import idle, shards
from .adamw import R_LR_SCALE, ReftAdamW, check_settings

# Optimizers that keep their Rs orthonormal already.
_attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def attach_retraction(
    optimizer: torch.optim.Optimizer, model: nn.Module | None = None, *, r_lr_scale: float = R_LR_SCALE
) -> None:
    """Make any torch optimizer keep the Rs of ``model`` (default: every R it holds) orthonormal.

    Before a step their gradients are projected to the tangent space; after it R <- retract(R_old + r_lr_scale (R - R_old)).
    Hooks are in neither state_dict nor a copy: attach again after loading or copying an optimizer (an optimizer
    that was forgotten is caught by :func:`guard_optimizers`). accelerate's wrapper is looked through.
    ``ValueError`` where the optimizer holds no R of the model.
    """
    check_settings({"r_lr_scale": r_lr_scale})
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer":
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise ValueError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
        optimizer = inner
    if isinstance(optimizer, ReftAdamW) or optimizer in _attached:
        return
    wanted = None if model is None else _Rs_of(model)
    if not _held(optimizer, wanted):
        raise ValueError("optimizer holds no orthonormal R" + ("" if model is None else " of model"))
    _attached.add(optimizer)
    before: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []

    def project() -> None:
        before.clear()
        by_rows = edited_by_rows()
        for R in _held(optimizer, wanted):
            if R.grad is not None:
                shards.refuse_flattened(R)
                old, gradient = shards.whole(R.detach()).clone(), shards.whole(R.grad)
                untouched = idle.of(by_rows, R, gradient, old)
                reference.project_(old, gradient)
                if untouched is not None:
                    gradient.masked_fill_(untouched.rows, 0)
                shards.keep(R.grad, gradient)
                before.append((R, old, None if untouched is None else untouched.rows))

    def pre_hook(_optimizer, args, kwargs):
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            project()
            return None

        def projected():  # a closure makes new gradients inside the step
            loss = closure()
            project()
            return loss

        if len(args) > 1:
            return (args[0], projected, *args[2:]), kwargs
        return args, {**kwargs, "closure": projected}

    @torch.no_grad()
    def post_hook(_optimizer, _args, _kwargs) -> None:
        wholes = [shards.whole(R) for R, *_ in before]
        for R, (_, old, _) in zip(wholes, before, strict=True):
            R.copy_(torch.lerp(old, R, r_lr_scale))
        whole = [full for full, (*_, rows) in zip(wholes, before, strict=True) if rows is None]
        functional.retract_(whole)
        for full, (_, old, rows) in zip(wholes, before, strict=True):
            if rows is not None:
                idle.Idle(rows, (full,), (old,)).keep_()
        for (R, *_), full in zip(before, wholes, strict=True):
            shards.keep(R, full)
        before.clear()

    optimizer.register_step_pre_hook(pre_hook)
    optimizer.register_step_post_hook(post_hook)


def _Rs_of(model: nn.Module) -> set[int]:
    return {id(m.R) for m in model.modules() if isinstance(m, Intervention) and m.orthonormal}


def _held(optimizer: torch.optim.Optimizer, wanted: set[int] | None) -> list[nn.Parameter]:
    Rs = orthonormal_parameters()
    return [
        p
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) in Rs and (wanted is None or id(p) in wanted)
    ]


@torch.no_grad()
def retract_model_(model: nn.Module) -> int:
    """Give every R of a model's interventions orthonormal rows, in place; how many there were.

    For averages of weights, which are off by as much as 0.3: ``AveragedModel`` (SWA, EMA) and the like.
    """
    Rs = [m.R for m in model.modules() if isinstance(m, Intervention) and m.orthonormal]
    functional.retract_(Rs)  # type: ignore[arg-type]
    return len(Rs)


_guarded = False


def guard_optimizers() -> None:
    """From now on any optimizer found to hold an R at one of its steps gets :func:`attach_retraction` first.

    Called when a ReFT model is built: HF Trainer, Lightning or a plain loop then keep R orthonormal without knowing of it.
    """
    global _guarded
    if not _guarded:
        register_optimizer_step_pre_hook(_guard)
        _guarded = True


def _guard(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    if optimizer in _attached or isinstance(optimizer, ReftAdamW):
        return
    if _held(optimizer, None):
        attach_retraction(optimizer)
    else:
        shards.refuse_parts(orthonormal_parameters().values())
