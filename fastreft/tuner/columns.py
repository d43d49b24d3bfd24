"""Our arguments of a forward as columns of a data set: Trainer drops what a model's forward does not name."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import nn

from ..joining import join
from ..plan.said import OURS


class _Column(str):
    """A name that is no label's: Trainer takes each parameter with "label" in its name for one that every batch must have."""

    def __contains__(self, part: Any) -> bool:
        return part != "label" and str.__contains__(self, part)


@cache
def _follow_trainer() -> None:
    """Have Trainer, imported or to be, keep our columns. Not before there is a model: Trainer's own import brings PEFT, which
    brings us, while there is no Trainer yet."""
    join("transformers.trainer", "fastreft.tuner.batches")


def accept(model: nn.Module) -> None:
    """Have the signature of the forward of a model's class name :data:`OURS`, which hooks take off before it is called.

    It is said at the class, once, as a function that a model has for itself would be shared by its copies and replicas.
    """
    _follow_trainer()
    forward: Any = getattr(type(model), "forward", None)
    if type(forward).__name__ != "function":
        return
    signature = inspect.signature(forward)
    kinds = inspect.Parameter
    rest = [p for p in signature.parameters.values() if p.kind is kinds.VAR_KEYWORD]
    named = [p for p in signature.parameters.values() if p.kind is not kinds.VAR_KEYWORD]
    new = [kinds(_Column(name), kinds.KEYWORD_ONLY, default=None) for name in OURS if name not in signature.parameters]
    if new:
        forward.__signature__ = signature.replace(parameters=[*named, *new, *rest])
