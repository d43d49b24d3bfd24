"""``fastreft info``: what is installed, which native core runs, and why."""

from __future__ import annotations

import platform
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from fastreft import _ops

from .arguments import Parser

# What tests/test_architectures.py found: model type -> the kinds of head tested and the blocks, or why not.
TABLE = Path(__file__).parent.parent / "architectures.json"


def facts() -> dict[str, str]:
    """Names and values, in the order to print them."""
    packages = {name: version(name) for name in ("fastreft", "torch", "transformers", "peft")}
    return {**packages, "python": f"{platform.python_version()} on {platform.machine()}", **_ops.build_info()}


def run(argv: Sequence[str]) -> int:
    """Print the facts, one a line."""
    Parser([], command="fastreft info", description="Versions, the native core in use, and why.").parse(argv)
    found = facts()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
    return 0
