"""The flags of ``fastreft serve``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError, user_errors
from ..places import find_model
from .parser import Parser, refuse_empty


@dataclass
class ServeArguments:
    """What to serve; ``rest`` are vLLM's own flags."""

    model: str = field(metadata={"help": "the base model: a folder, a name on a hub, or 'embedded'"})
    adapters: str = field(
        metadata={"help": "a folder with a folder for each adapter; they may come, change and go while the server runs"}
    )
    vectors: int | None = field(
        default=None, metadata={"help": "the vectors that the device has room for at each layer; 4096 if not given"}
    )
    lines: int | None = field(
        default=None, metadata={"help": "the edits that the device has room for at each layer; 1024 if not given"}
    )
    most_r: int | None = field(default=None, metadata={"help": "the largest rank that is served; 64 if not given"})
    rest: list[str] = field(default_factory=list, init=False)


def parse(argv: Sequence[str]) -> ServeArguments:
    """:class:`UserError` for what is wrong; what is not ours is vLLM's, which says what is wrong with it."""
    parser = Parser(
        [ServeArguments],
        command="fastreft serve",
        description="Serve a model and its adapters over HTTP, with vLLM; all other flags are vLLM's (vllm serve --help).",
    )
    with user_errors(ValueError, TypeError):
        arguments, rest = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    arguments.rest = rest
    refuse_empty(arguments, "adapters")
    find_model(arguments.model)
    if not Path(arguments.adapters).expanduser().is_dir():
        raise UserError(f"there is no folder '{arguments.adapters}'; adapters is one with a folder for each adapter")
    for name in ("vectors", "lines", "most_r"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    return arguments
