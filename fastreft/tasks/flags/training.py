"""Transformers' ``TrainingArguments`` as far as flags go, read from its source: importing it takes six seconds of CPU time.

The fields, their types, defaults and helps are evaluated as they stand there; enumerations come from the files that they
stand in. What cannot be known so (a default that depends on the torch installed) is left to Transformers.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any

from ...sources import assigned, tree_of

_FILE = "training_args.py"


class LeftToTransformers:
    """A default that only the real class knows."""

    def __str__(self) -> str:
        return "as Transformers has it"


def training_arguments() -> type:
    """A dataclass with the fields of ``TrainingArguments``; the class itself where its source is not what it was."""
    try:
        return _from_source()
    except Exception:  # of whatever kind: a later Transformers may be written in any way
        from transformers import TrainingArguments

        return TrainingArguments


def _from_source() -> type:
    tree = tree_of("transformers", _FILE)
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    types, values = _Names(partial(_enumeration, tree)), _Names(partial(_value, tree))
    fields = []
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            said = {keyword.arg: keyword.value for keyword in node.value.keywords if keyword.arg}
            metadata = said.pop("metadata", None)
            settings = {name: _evaluated(value, values) for name, value in said.items()}
            known = _known_of(metadata, values) if isinstance(metadata, ast.Dict) else {}
            fields.append(
                (node.target.id, _evaluated(node.annotation, types), dataclasses.field(**settings, metadata=known))
            )
    if not any(name == "output_dir" for name, *_ in fields):
        raise LookupError("no output_dir among the fields")
    return dataclasses.make_dataclass("TrainingArguments", fields)


def _known_of(metadata: ast.Dict, names: _Names) -> dict[str, Any]:
    """What of a field's metadata can be known: its help, its choices."""
    known = {}
    for key, value in zip(metadata.keys, metadata.values, strict=True):
        with suppress(AttributeError, TypeError):  # of what is left to Transformers
            if isinstance(key, ast.Constant):
                known[str(key.value)] = _evaluated(value, names)
    return known


class _Names(dict[str, Any]):
    """The names that an expression may use: Python's own and typing's; ``other`` gives any else."""

    def __init__(self, other: Callable[[str], Any]):
        super().__init__({**vars(builtins), **vars(typing)})
        self.other = other

    def __missing__(self, name: str) -> Any:
        self[name] = found = self.other(name)
        return found


def _evaluated(expression: ast.expr, names: _Names) -> Any:
    return eval(compile(ast.Expression(expression), _FILE, "eval"), {"__builtins__": {}}, names)


def _value(tree: ast.Module, name: str) -> Any:
    """What a module assigns to a name, or has imported from a module that is loaded anyway."""
    held = assigned(tree, name)
    if held is not None:
        return _evaluated(held, _Names(partial(_value, tree)))
    source = _imported_from(tree, name)
    return getattr(sys.modules.get(f"transformers.{source}"), name, LeftToTransformers())


def _enumeration(tree: ast.Module, name: str) -> Any:
    """The enumeration of texts that a module defines, or imports from a file beside it; ``str`` where there is none."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            members = {
                item.targets[0].id: item.value.value
                for item in node.body
                if isinstance(item, ast.Assign)
                and isinstance(item.targets[0], ast.Name)
                and isinstance(item.value, ast.Constant)
            }
            return Enum(name, members, type=str) if members else str
    source = _imported_from(tree, name)
    return str if source is None else _enumeration(tree_of("transformers", f"{source.replace('.', '/')}.py"), name)


def _imported_from(tree: ast.Module, name: str) -> str | None:
    """The module beside this one that a name is imported from."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and any(alias.name == name for alias in node.names):
            return node.module
    return None
