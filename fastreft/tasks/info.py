"""``fastreft info``: what is installed, which native core runs, and why."""

from __future__ import annotations

import json
import platform
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

# What tests/models/test_architectures.py found: model type -> the classes tested, the blocks, `generate`; or why not.
TABLE = Path(__file__).parent.parent / "models" / "architectures.json"


def facts() -> dict[str, str]:
    """Names and values, in the order to print them."""
    from fastreft.ops import native  # with torch, which the tables do without

    packages = {name: version(name) for name in ("fastreft", "torch", "transformers", "peft")}
    return {**packages, "python": f"{platform.python_version()} on {platform.machine()}", **native.build_info()}


def models() -> list[str]:
    """The table of model types, a line each: what was tested and what the blocks are called, or why not; then totals."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    rows = [("model type", "works", "generate", "heads tested; blocks (found by)")]
    notes = []
    for model_type, entry in sorted(table["models"].items()):
        generate = entry.get("generate", "-")
        if generate not in ("-", "checked"):
            notes.append(f"  {model_type}: {generate}")
            generate = f"{generate.split()[0].rstrip(':')}*"
        text = entry.get("why_not") or (
            f"{', '.join(entry['classes'])}; {', '.join(entry['blocks'])} ({entry['source']})"
        )
        rows.append((model_type, "no" if "why_not" in entry else "yes", generate, text))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    return [*lines, "", "* generate:", *notes, "", *totals(table)]


def tasks() -> list[str]:
    """Every task, a line each: what it is trained to do, and its metrics."""
    from .sets.registry import families, find, names

    rows = []
    for name in names():
        members = families().get(name)
        if members:
            rows.append((name, "family", ", ".join(members)))
        else:
            (task,) = find(name)
            rows.append((name, task.kind, ", ".join(task.metrics) or "judged elsewhere"))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return [f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {rest}" for name, kind, rest in rows]


def totals(table: dict[str, Any]) -> list[str]:
    """How many types and classes of the table work, have their ``generate`` checked, and do not work."""
    entries = table["models"].values()
    works = [entry for entry in entries if "blocks" in entry]
    checked = sum(entry.get("generate", "").startswith("checked") for entry in works)
    distinct = {name for entry in works for name in entry["classes"].values()}
    classes = sum(len(entry["classes"]) for entry in works)
    return [
        f"{len(works)} of {len(entries)} model types work, tested with Transformers {table['transformers']}",
        f"{classes} of {sum(len(entry['classes']) for entry in entries)} heads of these types work, "
        f"of {len(distinct)} different classes, as some types share one",
        f"{checked} types have their generate checked, {sum('generate' not in entry for entry in works)} do not generate, "
        f"{sum(entry.get('generate', '').startswith('not') for entry in works)} not checked",
        f"{len(entries) - len(works)} model types do not work",
    ]


def run(chosen: Namespace) -> int:
    """Print the facts, one a line; or the models; or the tasks."""
    if chosen.models or chosen.tasks:
        print("\n".join(models() if chosen.models else tasks()))
        return 0
    found = facts()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
    return 0
