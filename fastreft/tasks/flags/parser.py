"""Command-line flags and YAML keys from dataclasses, through Transformers' ``HfArgumentParser``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..errors import UserError, nearest, user_errors

# What other libraries call settings of ours and Transformers'.
USUAL_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "rank": "r",
    "low_rank_dimension": "r",
    "layers": "layers_to_transform",
    "target_layers": "layers_to_transform",
    "data": "train_file",
    "dataset": "task",
    "output": "output_dir",
    "share_weights": "tied",
}


class Parser(HfArgumentParser):
    """``HfArgumentParser`` whose complaints are :class:`UserError`; ``--config FILE.yaml`` comes before the flags."""

    def __init__(self, dataclass_types: Sequence[Any], *, command: str, **kwargs: Any):
        super().__init__(dataclass_types, prog=command, allow_abbrev=False, **kwargs)

    def error(self, message: str):  # type: ignore[override]  # argparse's exits; ours raises, and neither returns
        raise UserError(message)

    def require(self, name: str) -> None:
        """Make an optional field a required one."""
        next(action for action in self._actions if action.dest == name).required = True

    def hide(self, names: set[str]) -> None:
        """Leave fields out of the help."""
        for action in self._actions:
            if action.dest in names:
                action.help = argparse.SUPPRESS

    def let(self, name: str, kind: Any, default: Any, said: str) -> None:
        """Give a field another type, default and help."""
        action = next(action for action in self._actions if action.dest == name)
        action.type, action.default, action.help = kind, default, said

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """One instance of each dataclass; an unknown flag is an error that names the nearest valid one."""
        with user_errors(ValueError, TypeError, ImportError):
            *parsed, unknown = self.parse_args_into_dataclasses(
                list(argv), return_remaining_strings=True, look_for_args_file=False
            )
        if unknown:
            flag = unknown[0].split("=")[0]
            usual = USUAL_NAMES.get(flag.lstrip("-").replace("-", "_"))
            known = f"--{usual}" in self._option_string_actions
            hint = f"; did you mean '--{usual}'?" if known else nearest(flag, self._option_string_actions)
            raise UserError(f"unknown argument '{flag}'{hint}")
        return tuple(parsed)

    def with_config(self, argv: Sequence[str]) -> list[str]:
        """The flags, after those that the keys of ``--config``'s YAML file stand for, if it is there."""
        finder = Parser([], command=self.prog, add_help=False)
        finder.add_argument("--config")
        found, flags = finder.parse_known_args(list(argv))
        return self._flags_from_yaml(found.config) + flags if found.config else flags

    def _choices_of(self, name: str) -> list[Any] | None:
        """The values that a flag may have, where they are listed."""
        choices = next((action.choices for action in self._actions if action.dest == name), None)
        return None if choices is None else [getattr(choice, "value", choice) for choice in choices]

    def _flags_from_yaml(self, path: str) -> list[str]:
        """The file's keys as flags, so that both are typed and checked in one place; null leaves a default alone."""
        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the config file '{path}': {error.strerror}") from error
        except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
            raise UserError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(settings, dict):
            raise UserError(f"'{path}' holds no settings; expected lines of the form 'name: value'")
        valid = {action.dest for action in self._actions} - {"help", "config"}
        flags: list[str] = []
        for name, value in settings.items():
            if name not in valid:
                raise UserError(f"'{path}' has an unknown setting '{name}'{nearest(str(name), valid)}")
            if value is False and "no" in (self._choices_of(name) or ()):
                value = "no"  # as YAML reads it
            if isinstance(value, list):
                flags += [f"--{name}", *map(str, value)]
            elif isinstance(value, dict):
                flags.append(f"--{name}={json.dumps(value)}")
            elif value is not None:
                flags.append(f"--{name}={value}")
        return flags


def same_flag(kind: type, name: str) -> Any:
    """The flag of this name of another command, with its default and its help."""
    known = kind.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return dataclasses.field(default=known.default, metadata=dict(known.metadata))


def check_rows_file(name: str, path: str | None) -> None:
    """:class:`UserError` for a file of rows, if any, whose name does not say of which kind it is to be."""
    if path is not None and Path(path).suffix not in (".json", ".jsonl"):
        raise UserError(f"{name} is '{path}'; give a name that ends in .jsonl or .json")


def refuse_empty(arguments: Any, *names: str) -> None:
    """:class:`UserError` for folders that are given as "", which would be the one that the command is run in."""
    for name in names:
        if getattr(arguments, name) == "":
            raise UserError(f"{name} is empty; give a folder")


def bool_or_word(text: str) -> bool | str:
    """A flag of type ``bool | str``: yes or no in any of the ways that flags take, else the word as it is."""
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        return text


def _argument_type(hint: Any) -> Any:
    """The one type that a flag has: of a union, its list, or else its first member other than None."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    members = [member for member in get_args(hint) if member is not type(None)]
    if members == [bool, str]:
        return bool_or_word
    chosen = next((member for member in members if get_origin(member) is list), members[0])
    nested = any(get_origin(member) is dict for member in members)  # JSON
    if get_origin(chosen) is list and (str in members or nested):
        chosen = list[str]  # takes whatever the others take
    return chosen | None if len(members) < len(get_args(hint)) else chosen


def with_flag_types(settings: type) -> type:
    """A dataclass with the fields of another, of types that flags can have."""
    hints = get_type_hints(settings)
    own = []
    for field in dataclasses.fields(settings):
        copied = dataclasses.field(
            default=field.default, default_factory=field.default_factory, metadata=field.metadata
        )
        own.append((field.name, _argument_type(hints[field.name]), copied))
    return dataclasses.make_dataclass(settings.__name__, own)
