"""What the trainings of directions share: a model that is left as it was, edited at one place, and batches by a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..causal.sites import Attached, Site, evaluating
from ..plan.forward import Plan

Made = TypeVar("Made", bound=nn.Module)
Change = Callable[[Tensor], Tensor]
CLIP = 1.0  # of the gradient's norm, as AxBench has it


class Edited:
    """A site of a model; ``change``, if any, makes of its hidden states (B, T, d) those that the layers behind it have."""

    def __init__(self, site: Site):
        self.site = site
        self.change: Change | None = None

    def __call__(self, site: Site, plan: Plan, hidden: Tensor) -> Tensor:
        return hidden if self.change is None else self.change(hidden)


@contextmanager
def edited(model: nn.Module, site: Site) -> Iterator[Edited]:
    """Within it the model is in evaluation, its weights ask for no gradient, and its states at a site are what is said."""
    asking = [p for p in model.parameters() if p.requires_grad]
    attached = Attached(model, [site])
    made = Edited(site)
    attached.act = {site: made}
    for p in asking:
        p.requires_grad_(False)
    try:
        with evaluating(model):
            yield made
    finally:
        attached.remove()
        for p in asking:
            p.requires_grad_(True)


def made_by(seed: int, kind: Callable[..., Made], *settings: int) -> Made:
    """An edit whose start is the seed's, and nobody else's draws are others for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(*settings)


def steps_in(count: int, batch_size: int, epochs: int) -> int:
    """How many batches there are."""
    return epochs * math.ceil(count / batch_size)


def batches(count: int, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[list[int]]:
    """The numbers below ``count``, in batches, each epoch in an order of its own."""
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> float:
    """One step down a loss, gradients cut to a norm of :data:`CLIP`; the loss."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], CLIP)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    return float(loss.detach())


def falling(optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Rates that fall to 0 in a line over ``total`` steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
