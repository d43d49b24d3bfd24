"""Which of an edit's rows each sample of a forward has: what it, those round it or its call of ``generate`` were given."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_compiling

from ..ops.subspaces import Choices
from . import inputs, silence
from .asked import Asked

COMPILED = (
    "subspaces is for a model that is not compiled: which samples have which rows is looked at; leave torch.compile out"
)
TOGETHER = (
    "adapter_names, or model.reft(), and subspaces are given together; give one of them: an adapter that is named edits "
    "with all its rows"
)
NOTHING = "this forward in training edits nothing: subspaces leaves every sample without a row of the edit"
UNSAID = (
    "this forward in training has no subspaces, and the adapter has groups of rows that are to be trained each by its own "
    "samples: give the model subspaces, one choice a sample (a column of the data), None for a sample of all of them"
)


def of_forward(asked: Asked, plan: Any, shared: Any) -> Choices | None:
    """The choices of a forward, None where nobody made any. ``ValueError`` where they do not fit the batch, where training has
    none and an adapter's groups want some, and where they leave training nothing to edit."""
    choices, run = asked.first("subspaces"), asked.run
    if choices is None and run is not None:
        choices = run.subspaces
    if choices is None:
        if plan.training and shared.grouped and _any_grouped(shared.layers):
            raise ValueError(UNSAID)
        return None
    if is_compiling():
        silence.refuse_compiled(COMPILED)
        return None
    if plan.mixed is not None:
        raise ValueError(TOGETHER)
    shape = inputs.batch_shape(asked.given)
    if shape is not None:
        choices.check(shape[0], beams=run is not None)
    if plan.training and torch.is_grad_enabled() and choices.nothing:
        raise ValueError(NOTHING)
    return choices


def _any_grouped(layers: list[Any]) -> bool:
    """Does an active adapter have groups of rows?"""
    return any(
        name in layer.specs and layer.specs[name].groups
        for layer in layers
        if not layer._disable_adapters
        for name in layer.active_adapters
    )
