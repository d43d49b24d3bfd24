"""What a ReFT adapter is: a ``PeftConfig``, so that it saves, loads and travels as any PEFT adapter does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from ..interventions import INTERVENTIONS
from ..models import blocks
from ..ops import activations
from ..plan import positions


def _add_peft_type(name: str) -> None:
    """Give PEFT's ``PeftType`` a member: the enum is closed, and its own maps are the way in that PEFT leaves."""
    if name in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


_add_peft_type("REFT")


COMPONENTS = ("block_output", "block_input", *blocks.COMPONENTS)


@dataclass
class ReftConfig(PeftConfig):
    """The configuration of a ReFT adapter; each field says what it is in its ``help``.

    Raises ``ValueError`` naming the argument, what came and what is wanted.
    Source: ReFT (Wu et al. 2024, arXiv 2404.03592).
    """

    intervention_type: str = field(
        default="loreft", metadata={"help": f"The edit: {', '.join(INTERVENTIONS)}.", "choices": list(INTERVENTIONS)}
    )
    r: int = field(default=4, metadata={"help": "The rank of the edit, at least 1 and at most the hidden size."})
    positions: str = field(
        default="f5+l5",
        metadata={
            "help": "The tokens to edit: 'fN' the first N of the prompt, 'lM' the last M, 'fN+lM' both, "
            "'prompt' all of it, 'all' every token, decoded ones too, 'decode' only those."
        },
    )
    tied: bool | str = field(
        default=True,
        metadata={
            "help": "Which positions share an intervention: true = all of a layer; false = those of the prefix and those "
            "of the suffix ('fN+lM'), as in pyreft; position = none, each of the N + M has its own, as the paper's untied."
        },
    )
    layers_to_transform: list[int] | int | str | None = field(
        default=None,
        metadata={
            "help": "The layers to edit, counted from 0: some of them, a slice such as '4:12' or '::2', or 'all'; "
            "all of them if not given."
        },
    )
    component: str = field(
        default="block_output",
        metadata={"help": f"What of a block is edited: {', '.join(COMPONENTS)}.", "choices": list(COMPONENTS)},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "The modules whose output is edited, as a list of name endings or a regular expression; "
            "the model's transformer blocks if not given. Their output must have the hidden size."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, as a list of name endings or a regular expression."}
    )
    dropout: float = field(default=0.0, metadata={"help": "The dropout on the edited rows, at least 0 and below 1."})
    act_fn: str | None = field(
        default=None, metadata={"help": "The activation in the edit, by its Transformers name; linear if not given."}
    )
    add_bias: bool = field(default=False, metadata={"help": "Whether noreft's and nodireft's projection has a bias."})
    pyreft_compat: bool = field(
        default=False, metadata={"help": "Whether to count the positions of short prompts as pyreft does."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full and save with the adapter, such as a new classifier."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.REFT  # type: ignore[attr-defined]
        if self.intervention_type not in INTERVENTIONS:
            raise ValueError(
                f"intervention_type is {self.intervention_type!r}; it must be one of {', '.join(INTERVENTIONS)}"
            )
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}; it must be an integer of at least 1")
        self._check_tied()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; it must be at least 0 and below 1")
        if activations.native_id(self.act_fn) is None:
            activations.module(str(self.act_fn))
        if self.component not in COMPONENTS:
            raise ValueError(f"component is {self.component!r}; it must be one of {', '.join(COMPONENTS)}")
        if self.target_modules is not None and self.component != "block_output":
            raise ValueError(
                f"component is {self.component!r} and target_modules {self.target_modules!r}; give one of them, as "
                "target_modules names the modules whose output is edited"
            )
        self._check_layers()

    def _check_tied(self) -> None:
        """``ValueError`` for positions that are none, and for another way to share interventions than there are."""
        spec = positions.parse(self.positions)
        if self.tied not in (True, False, "position"):
            raise ValueError(f"tied is {self.tied!r}; it must be True, False or 'position'")
        if self.tied == "position" and not spec.places:
            raise ValueError(
                f"tied is 'position' and positions {self.positions!r}, which is no fixed number of positions that could "
                "have an intervention each; it must be 'fN', 'lM' or 'fN+lM', or tied True"
            )

    def _check_layers(self) -> None:
        """``ValueError`` for layers that no model has."""
        layers = self.layers_to_transform
        given = [layers] if isinstance(layers, int) else layers
        if given is None or (isinstance(given, str) and (given == "all" or _SLICE.fullmatch(given))):
            return
        if not given or any(type(i) is not int or i < 0 for i in given) or len(set(given)) < len(given):
            raise ValueError(
                f"layers_to_transform is {layers!r}; it must be a layer or a list of different layers, counted from 0, "
                "a slice such as '4:12' or '::2', or 'all'"
            )

    def layers_among(self, layers: list[int]) -> set[int]:
        """Those of a model's layers that ``layers_to_transform`` means; ``ValueError`` where one is missing, or all."""
        wanted = self.layers_to_transform
        if wanted is None or wanted == "all" or not layers:
            return set(layers)
        if isinstance(wanted, str):
            bounds = (int(part) if part else None for part in wanted.split(":"))
            chosen = set(range(max(layers) + 1)[slice(*bounds)]) & set(layers)
        else:
            chosen = {wanted} if isinstance(wanted, int) else set(wanted)
        if not chosen or not chosen <= set(layers):
            raise ValueError(
                f"layers_to_transform is {wanted!r}; the model's layers to choose from are {min(layers)} to {max(layers)}"
            )
        return chosen


_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(:-?[1-9]\d*|:)?")
