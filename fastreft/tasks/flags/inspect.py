"""The flags of ``fastreft inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import UserError
from ..modules import run_module
from .parser import Parser, refuse_empty


@dataclass
class InspectArguments:
    """What to look at."""

    path: str | None = field(default=None, metadata={"help": "a folder: a pyreft checkpoint or an adapter of ours"})
    adapter: str | None = field(default=None, metadata={"help": "the same, by name"})
    model: str | None = field(
        default=None, metadata={"help": "the base model of --prompt; the one that the adapter names if not given"}
    )
    prompt: list[str] | None = field(
        default=None, metadata={"help": "a text, or several: show which of its tokens the adapter edits, in brackets"}
    )
    intervention_type: str | None = field(
        default=None, metadata={"help": "the kind, for a trainer's checkpoint without config.json that does not tell"}
    )
    task_module: str | None = field(
        default=None, metadata={"help": "a Python file of yours that registers the adapter's edit; it is run"}
    )


def parse(argv: Sequence[str]) -> InspectArguments:
    """:class:`fastreft.tasks.errors.UserError` for what is wrong."""
    parser = Parser(
        [InspectArguments],
        command="fastreft inspect",
        description="Say what a pyreft checkpoint or an adapter of ours holds.",
    )
    if argv and not argv[0].startswith("-"):
        argv = ["--path", *argv]  # fastreft inspect FOLDER
    (arguments,) = parser.parse(argv)
    refuse_empty(arguments, "path", "adapter")
    if (arguments.path is None) is (arguments.adapter is None):
        raise UserError("give one folder, with --path or with --adapter")
    if arguments.prompt is None and arguments.model is not None:
        raise UserError("--model is for --prompt: a folder is read without its base model")
    if arguments.prompt is not None and not all(arguments.prompt):
        raise UserError("--prompt is empty; give a text")
    if arguments.task_module is not None:
        run_module(arguments.task_module)
    return arguments
