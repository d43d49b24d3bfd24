"""The arguments of a forward and of ``generate`` that are ours."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..ops.subspaces import Choices, parse
from .inputs import Given


class Said(NamedTuple):
    """What is ours among a forward's arguments, and its labels, which are also the model's."""

    explicit: Tensor | None = None  # reft_positions
    answers: Tensor | None = None  # reft_labels
    lengths: Tensor | None = None  # reft_prompt_lengths
    subspaces: Choices | None = None
    labels: Tensor | None = None


OURS = ("reft_positions", "reft_labels", "reft_prompt_lengths", "subspaces")
NAMES = dict(zip(Said._fields, (*OURS, "labels"), strict=True))  # of what was said, as users know it


def taken(given: Given, kwargs: Given) -> Said:
    """What is ours, taken off a forward's keywords. ``ValueError`` for what is no tensor; lengths are checked
    later."""
    explicit, answers, lengths, chosen = (kwargs.pop(name, None) for name in OURS)
    for name, value in ((OURS[0], explicit), (OURS[1], answers)):
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; it must be a tensor of integers, a row a sample")
    return Said(explicit, answers, lengths, None if chosen is None else parse(chosen), given.get("labels"))
