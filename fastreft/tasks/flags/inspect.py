"""The flags of ``fastreft inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .parser import Parser


@dataclass
class InspectArguments:
    """What to look at."""

    path: str = field(metadata={"help": "a folder: a pyreft checkpoint or an adapter of ours"})
    intervention_type: str | None = field(
        default=None, metadata={"help": "the kind, for a trainer's checkpoint without config.json that does not tell"}
    )


def parse(argv: Sequence[str]) -> InspectArguments:
    """:class:`fastreft.tasks.errors.UserError` for what is wrong."""
    parser = Parser(
        [InspectArguments],
        command="fastreft inspect",
        description="Say what a pyreft checkpoint or an adapter of ours holds.",
    )
    (arguments,) = parser.parse(argv)
    return arguments
