"""The flags of ``fastreft train``: ours, the adapter's, and Transformers' own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...settings import ReftSettings
from ..errors import UserError, user_errors
from ..places import find_model
from .parser import Parser, refuse_empty, with_flag_types
from .training import training_arguments


@dataclass
class ModelArguments:
    """What to train, and where the settings come from."""

    model: str = field(metadata={"help": "the base model: a folder, a hub id, or 'embedded' for the package's own"})
    dtype: str = field(default="auto", metadata={"help": "the base model's dtype, or 'auto' for its checkpoint's"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code of the model's own folder"})
    config: str | None = field(default=None, metadata={"help": "a YAML file of these settings; flags override it"})


@dataclass
class DataArguments:
    """What to train on."""

    train_file: str = field(metadata={"help": "records to train on: .jsonl, .json, .csv or .tsv"})
    eval_file: str | None = field(default=None, metadata={"help": "records to report the loss on after training"})
    prompt_field: str = field(default="prompt", metadata={"help": "the field that holds the prompt"})
    completion_field: str = field(default="completion", metadata={"help": "the field that holds the completion"})
    messages_field: str | None = field(
        default=None,
        metadata={
            "help": "a field that holds a list of {role, content} messages, the last the assistant's, instead of prompt"
            " and completion; goes through the tokenizer's chat template"
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "most tokens of prompt and completion together; 512 or the model's context where not given"},
    )


def parser_of(training: type) -> Parser:
    """The parser of all that a run can be told, ``training`` being Transformers' class or its stand-in."""
    parser = Parser(
        [ModelArguments, DataArguments, with_flag_types(ReftSettings), training],
        command="fastreft train",
        description="Train a ReFT adapter. Every setting can be a flag or a key of --config's YAML file.",
    )
    # The paper's learning rate and warmup; Trainer's defaults are meant for whole models.
    parser.set_defaults(learning_rate=9e-4, warmup_steps=0.1)
    parser.require("output_dir")  # TrainingArguments would make one up
    return parser


def parse(argv: Sequence[str]) -> list[str]:
    """The flags of a run, those of a YAML file first; :class:`UserError` for any that is wrong.

    What Transformers' ``TrainingArguments`` says of values that do not go together it says itself, when it is made of them.
    """
    parser = parser_of(training_arguments())
    flags = parser.with_config(argv)
    model, data, adapter, training = parser.parse(flags)
    with user_errors(ValueError, TypeError):
        ReftSettings(**settings_of(adapter)).check()
    find_model(model.model)
    for file in filter(None, (data.train_file, data.eval_file)):
        if not Path(file).expanduser().exists():
            raise UserError(f"cannot read the data file '{file}': No such file or directory")
    _check_ranges(training)
    refuse_empty(training, "output_dir")
    _check_optimizer(training)
    if Path(training.output_dir).exists() and not Path(training.output_dir).is_dir():
        raise UserError(f"output_dir '{training.output_dir}' is a file; give a folder")
    return flags


# Of Transformers' settings, those that it takes as they come.
_AT_LEAST: dict[str, float] = {
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers", "seed", "data_seed"), 0
    ),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
}
_BELOW_ONE = ("adam_beta1", "adam_beta2")
_ABOVE_ZERO = ("adam_epsilon", "num_train_epochs", "save_steps", "logging_steps", "eval_steps")


def _check_ranges(training: Any) -> None:
    """:class:`UserError` for a number that is out of its range, or is none."""
    for name, value in vars(training).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        wanted = None
        if name in _AT_LEAST and not _AT_LEAST[name] <= value < 2**32:
            wanted = f"at least {_AT_LEAST[name]}, and finite"
        elif name in _BELOW_ONE and not 0 <= value < 1:
            wanted = "at least 0 and below 1"
        elif name in _ABOVE_ZERO and not 0 < value < float("inf"):
            wanted = "above 0, and finite"
        elif name == "max_steps" and value != -1 and not 1 <= value < 2**63:
            wanted = "at least 1, or -1 for as many as num_train_epochs makes"
        if wanted is not None:
            raise UserError(f"{name} is {value}; it must be {wanted}")


def _check_optimizer(training: Any) -> None:
    """:class:`UserError` where another optimizer is asked for than the one that this command trains with."""
    optimizer = getattr(training.optim, "value", training.optim)
    if isinstance(optimizer, str) and optimizer not in ("adamw_torch", "adamw_torch_fused"):
        raise UserError(
            f"optim is {optimizer!r}; this command trains with ReftAdamW, which is AdamW and keeps R orthonormal: leave "
            "it out, or train with Trainer in Python, which takes any"
        )
    for name in ("optim_args", "optim_target_modules"):
        if getattr(training, name, None):
            raise UserError(f"{name} is {getattr(training, name)!r}; this command's ReftAdamW takes none: leave it out")


def settings_of(adapter: Any) -> dict[str, Any]:
    """The flags of an adapter as the fields of a :class:`ReftSettings`."""
    return {name: _names(value) for name, value in vars(adapter).items()}


def _names(value: Any) -> Any:
    """A flag's list as what it means: numbers, name endings, or one regular expression or slice, which stands alone."""
    if isinstance(value, list) and value and all(re.fullmatch(r"\d+", str(item)) for item in value):
        return [int(item) for item in value]
    if value == ["all"]:
        return "all"
    alone = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)
    return value[0] if alone and not re.fullmatch(r"[\w.]+", value[0]) else value
