"""The flags of ``fastreft train``: ours, the adapter's, and Transformers' own."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...settings import ReftSettings
from ..errors import UserError, user_errors
from ..modules import run_module
from ..places import find_model
from . import sharding
from .data import DataArguments
from .parser import Parser, bool_or_word, refuse_empty, with_flag_types
from .training import training_arguments


@dataclass
class ModelArguments:
    """What to train, and where the settings come from."""

    model: str = field(metadata={"help": "the base model: a folder, a hub id, or 'embedded' for the package's own"})
    dtype: str = field(default="auto", metadata={"help": "the base model's dtype, or 'auto' for its checkpoint's"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code of the model's own folder"})
    config: str | None = field(default=None, metadata={"help": "a YAML file of these settings; flags override it"})


@dataclass
class MethodArguments:
    """How to train it."""

    method: str = field(
        default="reft",
        metadata={
            "help": "what is trained: 'reft', another of PEFT's methods by its name ('lora', 'ia3', ...), 'full', 'head' (a "
            "classifier's) or 'last' (the last block, and the head): same data, same order, same seed"
        },
    )
    method_config: str | None = field(
        default=None,
        metadata={"help": "JSON of the configuration of another of PEFT's methods, such as '{\"r\": 8}'"},
    )
    r_lr_scale: float = field(default=2.0, metadata={"help": "the rate of ReFT's R as a multiple of that of all else"})
    head_lr_scale: float | None = field(
        default=None,
        metadata={
            "help": "the rate of a classifier's head, and of what else is trained beside ReFT's edits, so; if not given, half "
            "the number of a text's labels where learning_rate is auto, else 1"
        },
    )
    early_stopping: int = field(
        default=0,
        metadata={
            "help": "stop after so many evaluations without a better one, and keep the best: needs --eval_strategy and "
            "--load_best_model_at_end"
        },
    )

    def check(self) -> None:
        """:class:`UserError` for what does not go together."""
        self.settings()
        if self.method == "reft" and self.method_config is not None:
            raise UserError("method_config is for other methods; a ReFT adapter's settings are flags of their own")
        for name in ("r_lr_scale", "head_lr_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} is {value}; it must be above 0, and finite")
        if self.method == "head" and self.head_lr_scale not in (None, 1):
            raise UserError(f"head_lr_scale is {self.head_lr_scale}, and the method 'head' trains nothing else")
        if self.early_stopping < 0:
            raise UserError(f"early_stopping is {self.early_stopping}; it must be at least 0")

    def settings(self) -> dict[str, Any]:
        """method_config as a dict."""
        try:
            found = json.loads(self.method_config or "{}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"method_config is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise UserError(f"method_config is {self.method_config}; it must be a JSON object")
        return found


class _Auto(float):
    """A rate that is yet to be found, where a number is expected."""

    def __repr__(self) -> str:
        return "auto"

    __str__ = __repr__


AUTO = _Auto()
ANY = "auto"  # positions that suit the task


def _rate_or_auto(text: str) -> float:
    try:
        return AUTO if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'") from None


# Of Transformers' some hundred settings, those that --help shows.
_SHOWN = """output_dir num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps weight_decay
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps activation_checkpointing bf16
    eval_strategy eval_steps save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model
    resume_from_checkpoint logging_steps report_to seed use_cpu""".split()


TRAIN = ("fastreft train", "Train an adapter, or anything else of a model, on a task or on records of your own.")


def parser_of(training: type, *more: type, help_all: bool = True, of: tuple[str, str] = TRAIN) -> Parser:
    """The parser of all that a run can be told, ``training`` being Transformers' class or its stand-in, and ``more`` what else
    the command ``of`` takes. ``help_all``: its help shows all of it, and not what is asked for most alone."""
    command, what = of
    parser = Parser(
        [*more, ModelArguments, DataArguments, MethodArguments, with_flag_types(ReftSettings), training],
        command=command,
        description=f"{what} Every setting can be a flag or a key of --config's YAML file."
        + ("" if help_all else " --help-all lists the rest of Transformers' TrainingArguments."),
    )
    if not help_all:
        parser.hide({field.name for field in fields(training)} - {*_SHOWN})
    # A rate for the model and the adapter, and the paper's warmup; Trainer's defaults are meant for whole models.
    parser.let("learning_rate", _rate_or_auto, AUTO, "the rate, or 'auto': one that suits the model and the adapter")
    parser.let("positions", str, ANY, "the tokens to edit: 'fN' the first N of the prompt, 'lM' the last M, 'fN+lM' both, "
               "'prompt' all of it, 'all' every token, decoded ones too, 'decode' only those, 'dK' the first K of them, 'a:b' "
               "(or 'a:', ':b') the tokens a to b - 1 of all, counted from 0 (in YAML in quotes); or 'auto': 'all' where texts "
               f"or words are labelled, '{ReftSettings.positions}' where text is written")  # fmt: skip
    parser.let("fsdp", bool_or_word, None, "shard the model over the GPUs (FSDP2); see docs/devices.md")
    # Twenty points of a curve, however short a training is; else evaluations would come as often, which are asked for.
    parser.set_defaults(warmup_steps=0.1, logging_steps=0.05, eval_steps=500)
    parser.require("output_dir")  # TrainingArguments would make one up
    return parser


def parse(argv: Sequence[str]) -> list[str]:
    """The flags of a run, those of a YAML file first; :class:`UserError` for any that is wrong.

    What Transformers' ``TrainingArguments`` says of values that do not go together it says itself, when it is made of them.
    """
    return checked(argv, *TRAIN)[0]


def checked(argv: Sequence[str], command: str, what: str, *more: type) -> tuple[list[str], tuple[Any, ...], str]:
    """(the flags of a run, what they say of ``more``, the method), of a command that trains."""
    of = (command, what)
    if "--help-all" in argv:
        parser_of(training_arguments(), *more, of=of).print_help()
        raise SystemExit(0)
    parser = parser_of(training_arguments(), *more, help_all=False, of=of)
    flags = parser.with_config(argv)
    *own, model, data, method, adapter, training = parser.parse(flags)
    data.check()
    method.check()
    if data.task_module is not None:
        run_module(data.task_module)  # as it may register the edit
    with user_errors(ValueError, TypeError):
        ReftSettings(**with_positions(settings_of(adapter), labelled=False)).check()
    find_model(model.model)
    _check_ranges(training)
    refuse_empty(training, "output_dir")
    _check_optimizer(training)
    sharding.check(training, method.method)
    if method.early_stopping and not training.load_best_model_at_end:
        raise UserError("early_stopping needs --load_best_model_at_end and an --eval_strategy, as it keeps the best")
    if Path(training.output_dir).exists() and not Path(training.output_dir).is_dir():
        raise UserError(f"output_dir '{training.output_dir}' is a file; give a folder")
    return flags, tuple(own), method.method


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
    found = {name: _names(value) for name, value in vars(adapter).items() if name != "subspaces"}
    return {**found, "subspaces": _groups(adapter.subspaces)}


def _groups(texts: list[str] | None) -> Any:
    """--subspaces: JSON of an object, or of a list of rows each; :class:`UserError` for what is none."""
    if texts is None:
        return None
    try:
        found = [json.loads(text) for text in texts]
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"subspaces is {' '.join(texts)!r}, which is not JSON ({error}); it must be groups of rows, such as "
            '\'{"german": [0, 1, 2, 3], "instruct": [4, 5, 6, 7]}\''
        ) from error
    nested = isinstance(found[0], dict) or all(isinstance(group, list) for group in found[0])
    return found[0] if len(found) == 1 and nested else found


def with_positions(adapter: dict[str, Any], *, labelled: bool) -> dict[str, Any]:
    """The settings of an adapter, positions that were left to "auto" chosen by what the task does."""
    if adapter["positions"] != ANY:
        return adapter
    everywhere = labelled and adapter["tied"] != "position"  # which is of so many positions
    return {**adapter, "positions": "all" if everywhere else ReftSettings.positions}


def _names(value: Any) -> Any:
    """A flag's list as what it means: numbers, name endings, or one regular expression or slice, which stands alone."""
    if isinstance(value, list) and value and all(re.fullmatch(r"\d+", str(item)) for item in value):
        return [int(item) for item in value]
    if value == ["all"]:
        return "all"
    alone = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)
    return value[0] if alone and not re.fullmatch(r"[\w.]+", value[0]) else value
