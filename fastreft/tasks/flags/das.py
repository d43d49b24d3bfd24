"""The flags of ``fastreft das``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...plan.spec import parse as parse_positions
from ..errors import UserError, user_errors
from ..places import EMBEDDED, find_model
from .parser import Parser, check_rows_file, refuse_empty

KINDS = ("das", "boundless", "mask", "pca", "random")
POSITIONS = {"first": -5, "subject": -4, "preposition": -3, "the": -2, "other_noun": -1}  # of the task's prompts
COMPONENTS = ("block_output", "block_input", "mlp_output", "attention_output")


@dataclass
class DasArguments:
    """A variable, and where to look for it."""

    output_dir: str = field(metadata={"help": "where cells, subspaces and the picture go; a sweep goes on from there"})
    model: str = field(default=EMBEDDED, metadata={"help": "a folder, a hub id, or the package's own small model"})
    task: str | None = field(default=None, metadata={"help": "'agreement': the number of a subject, by template"})
    variable: str | None = field(
        default=None,
        metadata={"help": "the task's: 'number', if not given, or 'other_number', which the verb does not follow"},
    )
    verbs: list[str] = field(default_factory=lambda: ["is", "are"], metadata={"help": "the task's two answers"})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": 'pairs of your own, {"base": text, "source": text, "label": the text that is to follow} a line'
        },
    )
    test_file: str | None = field(default=None, metadata={"help": "the same, to score on"})
    layers: list[int] | None = field(default=None, metadata={"help": "all of the model's if not given"})
    component: str = field(default="block_output", metadata={"help": ", ".join(COMPONENTS)})
    positions: list[str] | None = field(
        default=None,
        metadata={"help": "integers (the k-th token, from the end below 0) or words such as l1; l1 if not given"},
    )
    kind: str = field(default="das", metadata={"help": "das, boundless, mask; pca and random are not trained"})
    dims: int = field(default=1, metadata={"help": "the dimensions of the subspace"})
    train_pairs: int = field(default=512, metadata={"help": "pairs that the task makes to train on"})
    test_pairs: int = field(default=256, metadata={"help": "pairs that the task makes to score on"})
    steps: int = field(default=100, metadata={"help": "training steps a cell"})
    batch_size: int = field(default=32, metadata={"help": "pairs a step"})
    lr: float = field(default=1e-2, metadata={"help": "the learning rate, which falls to 0"})
    seed: int = field(default=0, metadata={"help": "of the pairs, the subspaces' starts and the order"})
    random_weights: bool = field(
        default=False, metadata={"help": "a control: a model of this shape that was not trained"}
    )
    title: str = field(default="IIA", metadata={"help": "of the picture"})
    dtype: str = field(default="auto", metadata={"help": "the model's dtype, or 'auto' for its checkpoint's"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code of the model's own folder"})


def parse(argv: Sequence[str]) -> DasArguments:
    """:class:`UserError` for what is wrong."""
    parser = Parser(
        [DasArguments], command="fastreft das", description="Search for a variable over layers and positions."
    )
    parser.add_argument("--config", help="a YAML file of these settings; flags come after it")
    flags = parser.with_config(argv)
    arguments, *_ = parser.parse(flags)
    refuse_empty(arguments, "output_dir")
    find_model(arguments.model)
    if (arguments.task is None) is (arguments.train_file is None):
        raise UserError("give --task, or pairs of your own with --train_file and --test_file")
    if arguments.task not in (None, "agreement"):
        raise UserError(
            f"task is '{arguments.task}'; there is 'agreement', or give pairs with --train_file and --test_file"
        )
    if arguments.task is None and arguments.variable is not None:
        raise UserError("--variable is the task's; pairs of your own say it by their labels")
    if (arguments.train_file is None) is not (arguments.test_file is None):
        raise UserError("give both --train_file and --test_file")
    for name in ("train_file", "test_file"):
        path = getattr(arguments, name)
        check_rows_file(name, path)
        if path is not None and not Path(path).is_file():
            raise UserError(f"there is no {name} '{path}'")
    if arguments.kind not in KINDS:
        raise UserError(f"kind is '{arguments.kind}'; it must be one of {', '.join(KINDS)}")
    for text in arguments.positions or ():
        if not (text.lstrip("-").isdecimal() or (arguments.task and text in POSITIONS)):
            with user_errors(ValueError):
                parse_positions(text)
    if arguments.component not in COMPONENTS:
        raise UserError(f"component is '{arguments.component}'; it must be one of {', '.join(COMPONENTS)}")
    if len(arguments.verbs) != 2 or len(set(arguments.verbs)) != 2:
        raise UserError(f"verbs is {arguments.verbs}; it must be two words, the singular first")
    for name in ("dims", "train_pairs", "test_pairs", "steps", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} is {getattr(arguments, name)}; it must be at least 1")
    if not 0 < arguments.lr < float("inf"):
        raise UserError(f"lr is {arguments.lr}; it must be above 0, and finite")
    return arguments
