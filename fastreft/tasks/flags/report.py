"""The flags of ``fastreft report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..places import find_adapter, find_model
from .parser import Parser, refuse_empty


@dataclass
class ReportArguments:
    """What to look at, and where to write."""

    adapter: str = field(metadata={"help": "the folder of a ReFT adapter, best one that 'fastreft train' wrote"})
    output: str | None = field(
        default=None, metadata={"help": "the page; report.html in the adapter's folder if not given"}
    )
    model: str | None = field(default=None, metadata={"help": "the base model; the one the adapter names if not given"})
    prompt: list[str] | None = field(
        default=None, metadata={"help": "texts to look at; else the first records of the training's evaluation or test"}
    )
    records: int = field(default=4, metadata={"help": "how many of those"})
    data_dir: str | None = field(default=None, metadata={"help": "where the training's data lies now, if it was moved"})
    max_new_tokens: int = field(default=48, metadata={"help": "most tokens to write after a prompt"})
    dtype: str = field(default="auto", metadata={"help": "the base model's dtype, or 'auto' for its checkpoint's"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code of the model's own folder"})


def parse(argv: Sequence[str]) -> ReportArguments:
    """:class:`UserError` for what is wrong."""
    parser = Parser([ReportArguments], command="fastreft report", description="A page of what an adapter does.")
    (arguments,) = parser.parse(argv)
    refuse_empty(arguments, "adapter", "output")
    find_adapter(arguments.adapter)
    if arguments.model is not None:
        find_model(arguments.model)
    if arguments.records < 1 or arguments.max_new_tokens < 1:
        raise UserError("--records and --max_new_tokens must be at least 1")
    if arguments.prompt is not None and not all(arguments.prompt):
        raise UserError("--prompt is empty; give a text")
    if arguments.data_dir is not None and not Path(arguments.data_dir).expanduser().is_dir():
        raise UserError(f"there is no data folder '{arguments.data_dir}'")
    if arguments.output is not None and not arguments.output.endswith((".html", ".htm")):
        raise UserError(f"output is '{arguments.output}'; give a name that ends in .html")
    return arguments
