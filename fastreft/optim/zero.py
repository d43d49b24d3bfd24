"""DeepSpeed's ZeRO-1 and 2. Its optimizer steps flat parts of all parameters, one a process, in which no R is to be seen.

So R's gradient is projected where it comes up (the projection is linear, and R the same until the step: the mean of projected
gradients is the projected mean), and R is retracted when DeepSpeed has put the parameters together again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .. import functional, reference
from ..interventions import Intervention
from . import shards
from .adamw import R_LR_SCALE, check_settings


class ZeroRetraction(TrainerCallback):
    """Keeps the Rs of a model orthonormal that DeepSpeed's ZeRO-1 or 2 trains; nothing where it does not.

    A callback of Trainer, ``Trainer(..., callbacks=[ZeroRetraction()])``; in a loop of your own, :meth:`begin` after
    ``deepspeed.initialize`` and :meth:`after_step` after each ``engine.step()`` that is one. After a step
    R <- retract(R_old + r_lr_scale (R - R_old)), in fp32, on every process alike: into the parameter, and into what this
    process keeps of its fp32 master. With clipping, the norm is that of projected gradients. ``ValueError`` for an
    ``r_lr_scale`` that is not above 0.
    """

    def __init__(self, r_lr_scale: float = R_LR_SCALE):
        check_settings({"r_lr_scale": r_lr_scale})
        self.r_lr_scale = r_lr_scale
        self._old: dict[nn.Parameter, Tensor] = {}

    def begin(self, model: nn.Module) -> None:
        """Find the Rs that ZeRO has put into flat parts."""
        from_before = self._old
        self._old = {}
        Rs = [m.R for m in model.modules() if isinstance(m, Intervention) and m.orthonormal]
        for R in Rs:
            if isinstance(R, nn.Parameter) and R.requires_grad and shards.in_parts(R):
                self._old[R] = shards.whole_of_parts(R)
                if R not in from_before:
                    R.register_hook(lambda gradient, R=R: self._projected(R, gradient))
                shards.set_kept(R)

    @torch.no_grad()
    def after_step(self) -> None:
        """Retract the Rs after a step."""
        Rs = list(self._old)
        wholes = [torch.lerp(self._old[R], shards.whole_of_parts(R), self.r_lr_scale) for R in Rs]
        if wholes:
            functional.retract_(wholes)
        for R, full in zip(Rs, wholes, strict=True):
            shards.keep_parts(R, full)
            self._old[R] = full

    @torch.no_grad()
    def _projected(self, R: nn.Parameter, gradient: Tensor) -> Tensor:
        projected = gradient.float()
        if projected is gradient:
            projected = gradient.clone()
        reference.project_(self._old[R], projected)
        return projected.to(gradient.dtype)

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """Trainer's."""
        self.begin(model)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's."""
        self.after_step()
