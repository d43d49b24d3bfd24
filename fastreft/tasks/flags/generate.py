"""The flags of ``fastreft generate``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..modules import run_module
from ..places import find_model, find_trained
from .parser import Parser, check_rows_file, refuse_empty


@dataclass
class GenerateArguments:
    """What to write, and how."""

    adapter: str = field(metadata={"help": "the adapter's folder"})
    model: str | None = field(default=None, metadata={"help": "the base model; the one the adapter names if not given"})
    dtype: str = field(default="auto", metadata={"help": "the base model's dtype, or 'auto' for its checkpoint's"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code of the model's own folder"})
    prompt: list[str] | None = field(default=None, metadata={"help": "one prompt or more"})
    prompt_file: str | None = field(
        default=None,
        metadata={"help": "a text file, one prompt a line, or records (.jsonl, .json, .csv, .tsv); '-' is stdin"},
    )
    prompt_field: str = field(default="prompt", metadata={"help": "the field of a record that holds the prompt"})
    output: str | None = field(
        default=None, metadata={"help": "a file for what is written, .jsonl or .json, in place of the screen"}
    )
    chat: bool = field(
        default=False,
        metadata={
            "help": "put each prompt through the chat template as a user's message; said by the adapter's training"
        },
    )
    base: bool = field(default=False, metadata={"help": "write the untouched model's text too"})
    strength: float = field(
        default=1.0,
        metadata={
            "help": "of a ReFT adapter's edits: 1 as trained, 0 the untouched model, 0.5 half of each, -1 the other way"
        },
    )
    subspaces: str | None = field(
        default=None,
        metadata={"help": "the adapter's subspaces that edit, by name or number, joined by '+'; all if not given"},
    )
    task_module: str | None = field(
        default=None, metadata={"help": "a Python file of yours that registers the adapter's edit; it is run"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "most tokens to write after a prompt"})
    batch_size: int = field(default=8, metadata={"help": "prompts at a time"})
    do_sample: bool = field(default=False, metadata={"help": "sample instead of taking the likeliest token"})
    temperature: float = field(default=1.0, metadata={"help": "with --do_sample: below 1 is more predictable"})
    top_p: float = field(default=1.0, metadata={"help": "with --do_sample: keep the likeliest tokens of this total"})
    seed: int = field(default=0, metadata={"help": "with --do_sample: the random seed"})


def check_sampling(arguments: Any) -> None:
    """:class:`UserError` for settings that no text can be drawn by."""
    if arguments.do_sample and not (0 < arguments.temperature < float("inf") and 0 < arguments.top_p <= 1):
        raise UserError("--temperature must be above 0 and finite, and --top_p above 0 and at most 1")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed is {arguments.seed}; it must be from 0 to {2**32 - 1}")


NO_PROMPT = "there is nothing to complete: give --prompt TEXT or --prompt_file FILE, with no empty prompt"


def parse(argv: Sequence[str]) -> GenerateArguments:
    """:class:`UserError` for what is wrong."""
    parser = Parser([GenerateArguments], command="fastreft generate", description="Write text with a trained adapter.")
    (arguments,) = parser.parse(argv)
    refuse_empty(arguments, "adapter")
    if not arguments.prompt and not arguments.prompt_file:
        raise UserError(NO_PROMPT)
    find_trained(arguments.adapter)
    if arguments.model is not None:
        find_model(arguments.model)
    if arguments.max_new_tokens < 1 or arguments.batch_size < 1:
        raise UserError("--max_new_tokens and --batch_size must be at least 1")
    check_sampling(arguments)
    if not math.isfinite(arguments.strength):
        raise UserError(f"strength is {arguments.strength}; it must be a finite number")
    check_rows_file("output", arguments.output)
    if arguments.task_module is not None:
        run_module(arguments.task_module)
    return arguments
