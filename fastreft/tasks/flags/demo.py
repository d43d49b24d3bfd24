"""The flags of ``fastreft demo``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..places import EMBEDDED, find_model
from .parser import Parser, refuse_empty


@dataclass
class DemoArguments:
    """What to run the demo on."""

    model: str = field(default=EMBEDDED, metadata={"help": "a folder, a hub id, or the package's own small model"})
    steps: int = field(default=300, metadata={"help": "training steps of each method"})
    memory_steps: int = field(default=700, metadata={"help": "training steps of each memorisation test"})
    seed: int = field(default=0, metadata={"help": "of the data, the weights drawn and their order"})
    output_dir: str | None = field(default=None, metadata={"help": "where to keep the LoReFT adapter"})


def parse(argv: Sequence[str]) -> DemoArguments:
    """:class:`UserError` for what is wrong."""
    parser = Parser([DemoArguments], command="fastreft demo", description="What ReFT does, in under two minutes.")
    (arguments,) = parser.parse(argv)
    refuse_empty(arguments, "output_dir")
    if arguments.steps < 1 or arguments.memory_steps < 1:
        raise UserError("--steps and --memory_steps must be at least 1")
    if arguments.output_dir and Path(arguments.output_dir).is_file():
        raise UserError(f"output_dir '{arguments.output_dir}' is a file; give a folder")
    find_model(arguments.model)
    return arguments
