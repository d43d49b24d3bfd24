"""``fastreft info``: what is installed, which native core runs, and why."""

from __future__ import annotations

import json
import platform
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


def models() -> list[str]:
    """The table of model types, a line each: the kinds of head tested and what the blocks are called, or why not."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    width = max(map(len, table["models"]))
    lines = []
    for model_type, entry in sorted(table["models"].items()):
        text = (
            entry.get("why_not") or f"{', '.join(entry['blocks'])} ({', '.join(entry['kinds'])}; by {entry['source']})"
        )
        lines.append(f"{model_type:<{width}}  {'-' if 'why_not' in entry else '+'} {text}")
    works = sum("blocks" in entry for entry in table["models"].values())
    return [*lines, f"{works} of {len(lines)} model types, tested with Transformers {table['transformers']}"]


def run(argv: Sequence[str]) -> int:
    """Print the facts, one a line; or the models."""
    parser = Parser([], command="fastreft info", description="Versions, the native core in use, and why.")
    parser.add_argument("--models", action="store_true", help="list the model types tested, and those that do not work")
    (chosen,) = parser.parse(argv)
    if chosen.models:
        print("\n".join(models()))
        return 0
    found = facts()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
    return 0
