"""What a user can say of an adapter, and what is checked of it without a model. Imports neither torch nor PEFT, so that a
command line answers at once.
"""

from __future__ import annotations

import ast
import importlib
import numbers
import operator
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .models.components import COMPONENTS
from .ops.groups import Groups
from .ops.groups import parse as parse_groups
from .ops.names import FUSED_ACTIVATIONS, LATER, METHODS, STARTS, WHOLE, edits, may_be_identity, unknown_activation
from .plan.spec import parse
from .sources import assigned, tree_of

EMBEDDED = "embedded"  # the name of the package's own small model
EMBEDDED_PATH = Path(__file__).parent / "embedded"
EDITABLE = ("block_output", "block_input", *COMPONENTS)
MOST_UNTIED = 4096  # interventions of one layer
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(:-?[1-9]\d*|:)?")


@dataclass
class ReftSettings:
    """The fields that a :class:`fastreft.ReftConfig` adds to PEFT's; each says what it is in its ``help``."""

    intervention_type: str = field(
        default="loreft",
        metadata={"help": f"The edit: {', '.join((*METHODS, *LATER))}, or one of your own (docs/methods.md)."},
    )
    r: int = field(default=4, metadata={"help": "The rank of the edit, at least 1 and at most the hidden size."})
    subspaces: dict[str, list[int]] | list[list[int]] | None = field(
        default=None,
        metadata={
            "help": "Groups of the edit's rows, 0 to r - 1, that samples may choose of, by name or as a list of lists: "
            '{"german": [0, 1, 2, 3], "instruct": [4, 5, 6, 7]}.'
        },
    )
    positions: str = field(
        default="f5+l5",
        metadata={
            "help": "The tokens to edit: 'fN' the first N of the prompt, 'lM' the last M, 'fN+lM' both, "
            "'prompt' all of it, 'all' every token, decoded ones too, 'decode' only those, 'dK' the first K of them, "
            "'a:b' (or 'a:', ':b') the tokens a to b - 1 of all, counted from 0, as a slice of Python's."
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
        metadata={"help": f"What of a block is edited: {', '.join(EDITABLE)}.", "choices": list(EDITABLE)},
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
    init_weights: str | None = field(
        default=None,
        metadata={
            "help": "How an edit starts: 'identity' changes nothing until it is trained, as LoRA does; 'random' is pyreft's "
            "start, which edits from the first step; where not given, the identity for every edit that can be one."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full and save with the adapter, such as a new classifier."}
    )

    def check(self) -> None:
        """``ValueError`` naming the argument, what came and what is wanted. Numbers of numpy's, ranges and the like become the
        plain ones that a file can hold."""
        if not isinstance(self.intervention_type, str) or self.intervention_type not in edits():
            raise ValueError(
                f"intervention_type is {_short(self.intervention_type)}; it must be one of {', '.join(edits())}, or one of "
                "your own, once the module has been imported that registers it"
            )
        self.r = _integer(self.r)
        if type(self.r) is not int or not 1 <= self.r < 2**31:
            raise ValueError(f"r is {_short(self.r)}; it must be an integer of at least 1")
        self._check_subspaces()
        self._check_tied()
        if not isinstance(self.dropout, numbers.Real) or isinstance(self.dropout, bool) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {_short(self.dropout)}; it must be at least 0 and below 1")
        self.dropout = float(self.dropout)
        if self.act_fn is not None and (not isinstance(self.act_fn, str) or self.act_fn not in activation_names()):
            raise unknown_activation(self.act_fn if isinstance(self.act_fn, str) else _short(self.act_fn))
        if self.act_fn is not None and self.intervention_type in LATER:
            raise ValueError(f"act_fn is {self.act_fn!r}, and {self.intervention_type} has no activation; leave it out")
        if not isinstance(self.component, str) or self.component not in EDITABLE:
            raise ValueError(f"component is {_short(self.component)}; it must be one of {', '.join(EDITABLE)}")
        self._check_start()
        for name in ("add_bias", "pyreft_compat"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {_short(getattr(self, name))}; it must be True or False")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            setattr(self, name, _names(name, getattr(self, name)))
        if self.target_modules is not None and self.component != "block_output":
            raise ValueError(
                f"component is {self.component!r} and target_modules {self.target_modules!r}; give one of them, as "
                "target_modules names the modules whose output is edited"
            )
        self._check_layers()

    def _check_subspaces(self) -> None:
        """``ValueError`` for groups that are none; numbers of numpy's and the like become plain ones."""
        given = self.subspaces
        if isinstance(given, Mapping):
            given = {name: _integers(rows) for name, rows in given.items()}
        elif isinstance(given, (list, tuple)):
            given = [_integers(rows) for rows in given]
        self.subspaces = given
        if self.groups() and self.intervention_type in WHOLE:
            raise ValueError(f"subspaces are groups of R's rows, and {self.intervention_type} has none; leave them out")

    def groups(self) -> Groups:
        """``subspaces`` as they are counted."""
        return parse_groups(self.subspaces, self.r)

    def _check_tied(self) -> None:
        """``ValueError`` for positions that are none, and for another way to share interventions than there are."""
        spec = parse(self.positions)
        if not isinstance(self.tied, bool) and not (isinstance(self.tied, str) and self.tied == "position"):
            raise ValueError(f"tied is {_short(self.tied)}; it must be True, False or 'position'")
        if self.tied == "position" and spec.places > MOST_UNTIED:
            raise ValueError(
                f"tied is 'position' and positions {self.positions!r}: each of {spec.places} positions would have an "
                f"intervention of its own; there may be {MOST_UNTIED} at most"
            )
        if self.tied == "position" and not spec.places:
            raise ValueError(
                f"tied is 'position' and positions {self.positions!r}, which is no fixed number of places in the prompt that "
                "could have an intervention each; it must be 'fN', 'lM' or 'fN+lM', or tied True"
            )

    def _check_start(self) -> None:
        """``ValueError`` for a start that there is not, or that this edit cannot have."""
        if self.init_weights not in (None, *STARTS):
            raise ValueError(
                f"init_weights is {_short(self.init_weights)}; it must be one of {', '.join(STARTS)}, or None"
            )
        if self.init_weights == "identity" and not may_be_identity(self.intervention_type, self.act_fn):
            raise ValueError(
                f"init_weights is 'identity', but {self.intervention_type} with act_fn {self.act_fn!r} edits whatever its "
                "weights are; it must be 'random', or left out"
            )

    def start(self) -> str:
        """How the edit starts, one of ``STARTS``: ``init_weights``, or where that is None the identity if it can be."""
        if self.init_weights is not None:
            return self.init_weights
        return "identity" if may_be_identity(self.intervention_type, self.act_fn) else "random"

    def _check_layers(self) -> None:
        """``ValueError`` for layers that no model has."""
        layers = self.layers_to_transform
        if not isinstance(layers, (str, bool, type(None))):
            try:
                layers = [_integer(i) for i in layers]  # type: ignore[union-attr]
            except TypeError:
                layers = _integer(layers)
            self.layers_to_transform = layers
        given: Any = [layers] if type(layers) is int else layers
        if given is None or (isinstance(given, str) and (given == "all" or _SLICE.fullmatch(given))):
            return
        whole = isinstance(given, list) and all(type(i) is int and 0 <= i < 2**31 for i in given)
        if not given or not whole or len(set(given)) < len(given):
            raise ValueError(
                f"layers_to_transform is {_short(layers)}; it must be a layer or a list of different layers, counted from 0, "
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


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} that is too large to write"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _integer(value: Any) -> Any:
    """A whole number of whatever kind as Python's own; all else as it is."""
    if isinstance(value, (bool, int, str)) or not hasattr(value, "__index__"):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _integers(rows: Any) -> Any:
    """A row of whole numbers of whatever kind, a range say, as a list of Python's own; all else as it is."""
    if isinstance(rows, str) or not hasattr(rows, "__iter__"):
        return rows
    return [_integer(row) for row in rows]


def _names(name: str, value: Any) -> Any:
    """Module names as a list of text, or a regular expression that compiles; ``ValueError`` else."""
    if value is None:
        return None
    if isinstance(value, str) and name != "modules_to_save":
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{name} is {_short(value)}, which is no regular expression: {error}") from None
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and value and all(isinstance(v, str) and v for v in value):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    raise ValueError(f"{name} is {_short(value)}; it must be a list of module names")


def activation_names() -> set[str]:
    """Every name that ``act_fn`` may be: :data:`FUSED_ACTIVATIONS`, and those of Transformers' ``ACT2FN``.

    Where that is loaded it is asked itself, as people add to it; else its source is read, which takes a thousandth of the time,
    or, where that is not what it was, it is loaded.
    """
    names = [] if "transformers.activations" in sys.modules else _in_source()
    return {*FUSED_ACTIVATIONS, *(names or importlib.import_module("transformers.activations").ACT2FN)}


def _in_source() -> list[str]:
    try:
        tree = tree_of("transformers", "activations.py")
    except ImportError:
        return []
    table = assigned(tree, "ACT2CLS")
    keys = table.keys if isinstance(table, ast.Dict) else []
    return [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
