"""Which modules of a model, on the way to the edited blocks, make a plan, which hand down what they are given, which generate.

The innermost of Transformers' models above a block makes its plan, from its own inputs, at each of its calls: whatever is
round it may split a batch, rename arguments or call it twice. What that model is not given, its labels first of all, comes
from those round it. Where there is none of Transformers' models, the whole is taken for one.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

LM, MODEL, OTHER = "language model", "model of Transformers", "somebody's module"


class Entrance(NamedTuple):
    """A module to hang hooks on: its name, its kind (LM, MODEL or OTHER), and whether it is within an encoder-decoder."""

    name: str
    kind: str
    in_stacks: bool


def entrances(model: nn.Module, block_names: list[str]) -> tuple[list[Entrance], list[Entrance]]:
    """The modules that make plans, and those that hand down."""
    planners: dict[str, Entrance] = {}
    carriers: dict[str, Entrance] = {}
    for block in block_names:
        parts = block.split(".")
        above = [(name, model.get_submodule(name)) for name in _prefixes(parts)]
        kinds = [kind_of(module) for _, module in above]
        in_stacks = any(
            kind is not OTHER and _is_encoder_decoder(module) for (_, module), kind in zip(above, kinds, strict=True)
        )
        path = [Entrance(name, kind, in_stacks) for (name, _), kind in zip(above, kinds, strict=True)]
        innermost = max((i for i, entrance in enumerate(path) if entrance.kind is not OTHER), default=0)
        planners[path[innermost].name] = path[innermost]
        carriers.update({entrance.name: entrance for entrance in path[:innermost]})
    return list(planners.values()), list(carriers.values())


def kind_of(module: nn.Module) -> str:
    """LM for one that generates by itself, MODEL for another of Transformers', else OTHER."""
    if not hasattr(type(module), "main_input_name"):  # asked of the class: wrappers lend their inner model's attributes
        return OTHER
    can_generate = getattr(module, "can_generate", None)
    return LM if can_generate is not None and bool(can_generate()) else MODEL


def attends_backwards_only(module: nn.Module) -> bool:
    """Is a model without a head a decoder, whose labels, one a token, would be a continuation?"""
    return any(getattr(part, "is_causal", False) is True for part in module.modules())


def _is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _prefixes(parts: list[str]) -> list[str]:
    """The names of the modules above one, the whole model's, "", first."""
    return [".".join(parts[:i]) for i in range(len(parts))]
