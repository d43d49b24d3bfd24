"""Keeping R orthonormal while it trains: one retraction a step for all matrices, instead of a parametrization.

The step for an R (r, d) with gradient G and learning rate lr (2 lr moves R as far as pyreft's parametrization does):

    A = G R^T;  G <- G - 1/2 (A + A^T) R;  Adam;  Y = R - 2 lr U;  Y Y^T = L L^T;  R <- L^-1 Y

W and b take plain AdamW steps; weight decay never touches R. Two ways to it: :class:`ReftAdamW` does everything in one
native call; :mod:`fastreft.optim.guard` teaches it to any other torch optimizer.
Source: Riemannian optimisation on the Stiefel manifold with a Cholesky-QR retraction (Absil, Mahony, Sepulchre 2008, 4.1.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..interventions import edited_by_rows, orthonormal_parameters
from ..ops import native
from ..ops import step as native_step
from . import idle, shards

R_LR_SCALE = 2.0  # R's learning rate as a multiple of W's: the pace of pyreft's parametrization


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda x: x >= 0, "a finite number of at least 0"),
    "betas": (lambda x: 0 <= x < 1, "two numbers of at least 0 and below 1"),
    "eps": (lambda x: x > 0, "a finite number above 0"),
    "weight_decay": (lambda x: x >= 0, "a finite number of at least 0"),
    "r_lr_scale": (lambda x: x > 0, "a finite number above 0"),
}


def check_settings(group: dict[str, Any]) -> None:
    """``ValueError`` naming the first hyperparameter of a group that is out of its range, not finite or no number."""
    for name, (ok, wanted) in _RANGES.items():
        if name not in group:
            continue
        value = group[name]
        try:
            numbers = [float(x) for x in value] if name == "betas" else [float(value)]
            good = (
                len(numbers) == (2 if name == "betas" else 1)
                and all(map(math.isfinite, numbers))
                and all(map(ok, numbers))
            )
        except (TypeError, ValueError, OverflowError, RuntimeError):
            good = False
        if not good or isinstance(value, (bool, str)):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")


@dataclass
class _Call:
    """Parameters that are stepped together, those of a group's settings; an item is a parameter with its gradient, its two
    moments and its age."""

    group: dict[str, Any]
    age: int
    in_shards: bool
    rotations: list[tuple[Any, ...]] = field(default_factory=list)
    others: list[tuple[Any, ...]] = field(default_factory=list)


def param_groups(model: nn.Module, *, lr: float | Tensor, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The trainable parameters of a model for :class:`ReftAdamW`: all but the Rs, then the Rs.

    Both groups have the same lr (R's is scaled in the step) and W, b take ``weight_decay``. ``ValueError`` where nothing
    requires a gradient, and for a number out of range.
    """
    check_settings({"lr": lr, "weight_decay": weight_decay})
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model has no parameter that requires a gradient")
    Rs = orthonormal_parameters()
    groups = [
        {"params": [p for p in trainable if id(p) not in Rs], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in Rs], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class ReftAdamW(torch.optim.Optimizer):
    """AdamW for W, b and whatever else trains, projected Adam and a retraction for every R, in one native call for all groups
    of the same settings (of the Rs, those beside the decay).

    An R is recognised by its module, in whatever group it is. ``r_lr_scale`` times the group's lr is R's. Moments are fp32
    (fp64 for fp64). ``ValueError`` for a hyperparameter out of range; ``FloatingPointError`` naming the parameter, with no
    parameter of its call changed, for a gradient that is not finite. On a GPU, where that would need a sync, an R with
    such a gradient is left as it was, and :meth:`skipped` counts them. Survives deepcopy, pickling and state_dict.
    Takes FSDP2's shards: every rank steps the same whole R, and of W and b its own part, whose gradient it alone looks at;
    Rows of an R with a gradient of exactly 0, as those of ``subspaces`` that no sample of the step had, stay as they are.
    ``ValueError`` for an R that FSDP1 or DeepSpeed's ZeRO-3 flattened, or that ZeRO-1 or 2 steps in parts without a
    :class:`fastreft.ZeroRetraction`.

    ``capturable=True`` lets a CUDA graph capture :meth:`step`, after one step outside it: ages are then fp32 tensors beside
    their parameters, counted up there, and ``lr`` may be a 0-dim fp32 or fp64 tensor on the parameters' device, which every
    replay reads anew (a number is captured as it is). The bits are those of the step that is not capturable.
    ``RuntimeError`` for a capture without it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r_lr_scale: float = R_LR_SCALE,
        capturable: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "r_lr_scale": r_lr_scale}
        check_settings(defaults)
        super().__init__(params, {**defaults, "capturable": capturable})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; ``ValueError`` for a hyperparameter of the group that is out of range."""
        check_settings({**self.defaults, **param_group} if isinstance(param_group, dict) else self.defaults)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("capturable", False)  # saved before there was such a thing

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments stay fp32 beside 16-bit parameters, where torch casts them to the parameters' dtype."""
        for group in state_dict["param_groups"]:
            check_settings(group)
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if name in self.state.get(p, {}):
                    self.state[p][name] = state_dict["state"][key][name].to(p.device, _wide(p))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` reevaluates the loss, as in every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        Rs = orthonormal_parameters()
        self._status: list[Tensor | None] = []
        if not any(id(p) in Rs for group in self.param_groups for p in group["params"]):
            shards.refuse_parts(Rs.values())
        for call in self._calls(Rs):
            if not call.in_shards:
                self._update(call, call.rotations + call.others, len(call.rotations))
            else:
                self._update_shards(call)
            if not call.group["capturable"]:  # a step that was refused is none
                for p, *_ in call.rotations + call.others:
                    self.state[p]["step"] = call.age
        return loss

    def _calls(self, Rs: Container[int]) -> list[_Call]:
        """The parameters with gradients, of all groups, by what one call can step: one device, age and settings, all of them
        in shards or none. No setting of theirs but the decay, which no R has, keeps an R from those beside it."""
        rotations: dict[tuple[Any, ...], _Call] = {}
        others: dict[tuple[Any, ...], _Call] = {}
        for group in self.param_groups:
            lr, capturable = group["lr"], group["capturable"]
            settings = (
                lr if not isinstance(lr, Tensor) else id(lr),
                *group["betas"],
                group["eps"],
                group["r_lr_scale"],
            )
            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                state = self.state[p]
                if not state:
                    self._begin(p, state)
                if not capturable:
                    age = int(state["step"]) + 1
                else:
                    age = 0  # which the device knows
                    if not isinstance(state["step"], Tensor):
                        state["step"] = torch.tensor(float(state["step"]), device=p.device)
                if not grad.is_contiguous():
                    grad = grad.contiguous()
                in_shards, is_R = shards.is_dtensor(p), id(p) in Rs
                key = (p.device, age, in_shards, capturable, *settings, *(() if is_R else (group["weight_decay"],)))
                table = rotations if is_R else others
                call = table.get(key)
                if call is None:
                    call = table[key] = _Call(group, age, in_shards)
                items = call.rotations if is_R else call.others
                items.append((p, grad, state["exp_avg"], state["exp_avg_sq"], state["step"]))
        for key, call in others.items():
            if alone := rotations.pop(key[:-1], None):
                call.rotations = alone.rotations
        return [*others.values(), *rotations.values()]

    def skipped(self) -> int:
        """How many Rs the last step left as they were, their gradient not being finite: waits for the GPU. 0 on a CPU."""
        return sum(int((status == 2).sum()) for status in getattr(self, "_status", []) if status is not None)

    def _begin(self, p: Tensor, state: dict[str, Any]) -> None:
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError("ReftAdamW does not take sparse gradients")
        if native_step.capturing(p):
            raise RuntimeError(
                "a parameter's first optimizer step is being captured in a CUDA graph, which would begin its moments anew at "
                "every replay; take one step before the capture"
            )
        state["step"] = 0
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(p, dtype=_wide(p), memory_format=torch.contiguous_format)

    def _update_shards(self, call: _Call) -> None:
        """The step of FSDP2's parameters: an R whole on every rank, else each rank its own elements, where it has any."""
        own = [tuple(map(shards.local, item)) for item in call.others]
        if own := [item for item in own if item[0].numel()]:
            self._update(call, own, 0)
        if not call.rotations:
            return
        wholes = [tuple(map(shards.whole, item)) for item in call.rotations]
        self._update(call, wholes, len(wholes))
        for (p, _, m, v, _), (whole_p, _, whole_m, whole_v, _) in zip(call.rotations, wholes, strict=True):
            shards.keep(p, whole_p)
            shards.keep(m, whole_m)
            shards.keep(v, whole_v)

    def _update(self, call: _Call, items: list[tuple[Any, ...]], rotations: int) -> None:
        """The step of items, of which the first ``rotations`` are the call's."""
        group = call.group
        params, grads, m, v, ages = (list(column) for column in zip(*items, strict=True))
        by_rows = edited_by_rows() if rotations else set()
        known_as = [p for p, *_ in call.rotations[:rotations]]
        found = zip(known_as, grads, params, m, v, strict=False) if by_rows else ()
        untouched = [each for some in found if (each := idle.of(by_rows, *some)) is not None]
        lr: Any = group["lr"]
        live_lr: Tensor | None = None
        if group["capturable"] and isinstance(lr, Tensor):
            if lr.device == params[0].device:
                lr, live_lr = 1.0, lr
            elif native_step.capturing(params[0]):
                raise RuntimeError(
                    f"lr is on {lr.device} and a parameter on {params[0].device}; a captured step reads lr on the same device"
                )
        if group["capturable"]:
            torch._foreach_add_(ages, 1)
        try:
            self._run(call, params, grads, m, v, ages, live_lr, float(lr), rotations)
        except FloatingPointError:
            if group["capturable"]:
                torch._foreach_sub_(ages, 1)
            raise
        for each in untouched:
            each.keep_()

    def _run(
        self,
        call: _Call,
        params: list[Tensor],
        grads: list[Tensor],
        m: list[Tensor],
        v: list[Tensor],
        ages: list[Any],
        live_lr: Tensor | None,
        lr: float,
        rotations: int,
    ) -> None:
        group, age = call.group, call.age
        beta1, beta2 = group["betas"]
        settings = {
            "lr": lr,
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
        }
        for R in params[:rotations]:
            shards.refuse_flattened(R)
        if native.runs(params[0]) and all(p.is_contiguous() for p in params):
            given_ages = ages if group["capturable"] else []
            settings |= {"r_lr_scale": group["r_lr_scale"], "age": age}
            self._status.append(native_step.step_(params, grads, m, v, given_ages, live_lr, rotations, settings))
            return
        for i, g in enumerate(grads):
            if not bool(torch.isfinite(g).all()):
                raise FloatingPointError(f"the gradient of params[{i}] {tuple(g.shape)} is not finite")
        if live_lr is not None:
            settings["lr"] *= float(live_lr)
        for i, (p, g, m_, v_, step) in enumerate(zip(params, grads, m, v, ages, strict=True)):
            steps = int(step) if group["capturable"] else age
            corrections = {"correction1": 1 - beta1**steps, "correction2": 1 - beta2**steps}
            its = settings if i >= rotations else settings | {"lr": settings["lr"] * group["r_lr_scale"]}
            reference.step_(p, g, m_, v_, orthonormal=i < rotations, **its, **corrections)


def _wide(p: Tensor) -> torch.dtype:
    """The dtype of p's moments."""
    return torch.promote_types(p.dtype, torch.float32)
