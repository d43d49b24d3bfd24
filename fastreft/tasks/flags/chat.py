"""The flags of ``fastreft chat``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from ..errors import UserError
from ..modules import run_module
from ..places import find_model, find_trained
from .generate import GenerateArguments, check_sampling
from .parser import Parser, refuse_empty, same_flag

_of_generation = partial(same_flag, GenerateArguments)


@dataclass
class ChatArguments:
    """Whom to talk to."""

    adapter: str = field(metadata={"help": "the adapter's folder"})
    model: str | None = _of_generation("model")
    dtype: str = _of_generation("dtype")
    trust_remote_code: bool = _of_generation("trust_remote_code")
    system: str | None = field(default=None, metadata={"help": "a system message to begin with"})
    strength: float = _of_generation("strength")
    task_module: str | None = _of_generation("task_module")
    max_new_tokens: int = field(default=512, metadata={"help": "most tokens of an answer"})
    do_sample: bool = _of_generation("do_sample")
    temperature: float = _of_generation("temperature")
    top_p: float = _of_generation("top_p")
    seed: int = _of_generation("seed")


def parse(argv: Sequence[str]) -> ChatArguments:
    """:class:`UserError` for what is wrong."""
    parser = Parser(
        [ChatArguments],
        command="fastreft chat",
        description="Talk to a model with a trained adapter. An empty line begins anew, the end of the input ends.",
    )
    (arguments,) = parser.parse(argv)
    refuse_empty(arguments, "adapter")
    find_trained(arguments.adapter)
    if arguments.model is not None:
        find_model(arguments.model)
    if arguments.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {arguments.max_new_tokens}; it must be at least 1")
    if not math.isfinite(arguments.strength):
        raise UserError(f"strength is {arguments.strength}; it must be a finite number")
    check_sampling(arguments)
    if arguments.task_module is not None:
        run_module(arguments.task_module)
    return arguments
