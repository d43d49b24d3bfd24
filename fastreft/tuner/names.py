"""Adapters' names. PEFT tells the tensors of a model's adapters apart by looking for the names in the tensors', so a name that
is a part of another adapter's would have that one saved without them.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..kinds import KINDS
from ..plan.spec import parse
from .config import ReftConfig
from .layer import ReftLayer

TAKEN = {"R", "W", "P", "b", "c", "act", "weight", "reft", "reft_edit", "reft_suffix", "base_model", "model"}


def check(adapter_name: Any) -> None:
    """``ValueError`` for a name that no adapter could have beside another, or is none."""
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name is {adapter_name!r}; it must be a name without dots")
    if adapter_name in TAKEN:
        raise ValueError(f"adapter_name is {adapter_name!r}; it must be none of {', '.join(sorted(TAKEN))}")


def check_beside(model: nn.Module, adapter_name: str, new: set[str] | None = None) -> None:
    """``ValueError`` where an adapter to come has a name that is a part of the tensors' of a model's adapters, or the other way
    round: ``new`` are the parts of its own tensors' names, :func:`parts_to_come`; None where it is another method's."""
    held: dict[str, Any] = dict(getattr(model, "peft_config", None) or {})
    beside = _parts(model, all_kinds=new is not None)
    clashes = [
        (adapter_name, "an adapter", beside | (new or set())),
        *((name, "the adapter to come", new or set()) for name in held),
    ]
    for name, whose, parts in clashes:
        if name in parts:
            raise ValueError(
                f"adapter_name is {name!r}, a part of the name of a module that is edited or saved, or of the tensors of "
                f"{whose}, by which PEFT could no longer tell the adapters' tensors apart; give another"
            )


def check_saved(model: nn.Module, adapter_name: str, others: list[str]) -> None:
    """``ValueError`` where PEFT would take tensors of an adapter for another's, and leave them out of its file."""
    lost = sorted(_parts(model, only=adapter_name) & {*others})
    if lost:
        raise ValueError(
            f"adapter_name is {lost[0]!r}, a part of the names of the tensors of {adapter_name!r}, which could not be saved "
            f"beside it; delete the adapter {lost[0]!r} first, or save {adapter_name!r} before it is added"
        )


def parts_to_come(config: ReftConfig, targets: set[str]) -> set[str]:
    """What the names of the tensors of an adapter will be made of, its own name aside."""
    parts = {part for name in (*targets, *(config.modules_to_save or ())) for part in name.split(".")}
    if config.tied == "position":
        parts |= set(map(str, range(parse(config.positions).places)))
    with torch.device("meta"):
        held = KINDS[config.intervention_type](
            embed_dim=config.r, low_rank_dimension=config.r, act_fn=config.act_fn, add_bias=config.add_bias
        )
    parts |= {part for key in held.state_dict() for part in key.split(".")}
    return parts


def _parts(model: nn.Module, *, all_kinds: bool = False, only: str | None = None) -> set[str]:
    """What the names of adapters' tensors in a model are made of, the adapters' own names aside: those of ReFT, or of
    ``all_kinds`` and of modules saved with them; of the one adapter ``only``."""
    parts: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, ReftLayer):
            for key in module.state_dict():
                group, adapter, *rest = key.split(".")
                if only is None or adapter == only:
                    parts.update(name.split("."), (group,), rest)
        elif all_kinds and isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            held: Any = module
            own = held._get_available_adapters() if isinstance(module, BaseTunerLayer) else held._adapters
            parts.update(name.split("."), {part for key in held.state_dict() for part in key.split(".")} - own)
    return parts
