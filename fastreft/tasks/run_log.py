"""What is written beside an adapter (how it was trained, what it is to be given, what it scored), and rows of what it wrote."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files import staged
from .errors import user_errors
from .places import ADAPTER_CONFIG

RUN = "training.json"


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    return {
        **{name: version(name) for name in ("fastreft", "torch", "transformers", "peft")},
        "python": platform.python_version(),
    }


def read_log(folder: str | Path) -> dict[str, Any]:
    """The log in a folder; {} where there is none that can be read, as of an adapter of somebody else's."""
    try:
        found = json.loads((Path(folder).expanduser() / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def put_log(folder: Path, log: dict[str, Any]) -> None:
    """The log into a folder that nobody reads yet."""
    text = json.dumps(log, indent=1, ensure_ascii=False, default=str) + "\n"
    (folder / RUN).write_text(text, encoding="utf-8")


def write_log(folder: str | Path, log: dict[str, Any]) -> None:
    """The log into a folder, whole or not at all."""
    with staged(folder, last=ADAPTER_CONFIG) as staging:
        put_log(staging, log)


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    """Rows into a file, one a line (.jsonl) or as a list (.json), whole or not at all."""
    lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
    as_list = json.dumps(rows, indent=1, ensure_ascii=False, default=str)
    text = "\n".join(lines) if path.endswith(".jsonl") else as_list
    where = Path(path).expanduser()
    with (
        user_errors(OSError, prefix=f"cannot write '{path}': "),
        staged(where.parent, last=where.name) as staging,
    ):
        (staging / where.name).write_text(text + "\n", encoding="utf-8")


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of the process, all that it ever held."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
