"""The flags of ``fastreft convert``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...plan.spec import parse as parse_positions
from ..errors import UserError, user_errors
from ..places import find_adapter, find_model
from .parser import Parser, refuse_empty

GGUF = ".gguf"


@dataclass
class ConvertArguments:
    """What to convert, and what pyreft's files do not say."""

    source: str = field(
        metadata={
            "help": "a folder: a pyreft checkpoint, or an adapter of ours to convert back; or a .gguf file of control vectors"
        }
    )
    output_dir: str = field(metadata={"help": "the folder to write; or, of an adapter of ours, a .gguf file"})
    model: str | None = field(
        default=None,
        metadata={"help": "the base model, of which only config.json is read; an adapter of ours names its own"},
    )
    positions: str | None = field(
        default=None,
        metadata={
            "help": "the tokens to edit; 'l1' if not given, 'f1+l1' for prefix and suffix apart, 'all' for control vectors"
        },
    )
    act_fn: str | None = field(
        default=None, metadata={"help": "the activation it was trained with; linear if not given"}
    )
    dropout: float = field(default=0.0, metadata={"help": "the dropout to train on with"})
    dtype: str = field(default="float32", metadata={"help": "the dtype of W, b and P to write; R is kept in float32"})
    intervention_type: str | None = field(
        default=None, metadata={"help": "the kind, for a trainer's checkpoint without config.json that does not tell"}
    )
    orthonormalise: bool = field(
        default=False, metadata={"help": "give an R that pyreft let drift orthonormal rows, with the same edit"}
    )


def parse(argv: Sequence[str]) -> ConvertArguments:
    """:class:`UserError` for what is wrong."""
    parser = Parser(
        [ConvertArguments],
        command="fastreft convert",
        description="Convert a pyreft checkpoint, or a control vector of llama.cpp or repeng, to an adapter of ours, or back.",
    )
    (arguments,) = parser.parse(argv)
    refuse_empty(arguments, "source", "output_dir")
    source, target = Path(arguments.source).expanduser(), Path(arguments.output_dir).expanduser()
    if arguments.output_dir.endswith(GGUF):
        find_adapter(arguments.source)
        if target.is_dir():
            raise UserError(f"output_dir '{arguments.output_dir}' is a folder; give a file")
    elif target.exists() and (not target.is_dir() or target.resolve() == source.resolve()):
        raise UserError(f"output_dir '{arguments.output_dir}' is a file or the source itself; give another folder")
    if arguments.source.endswith(GGUF) and not source.is_file():
        raise UserError(f"cannot read the control vectors '{arguments.source}': No such file or directory")
    if arguments.model is not None:
        find_model(arguments.model)
    if arguments.positions is not None:
        with user_errors(ValueError):
            parse_positions(arguments.positions)
    return arguments
