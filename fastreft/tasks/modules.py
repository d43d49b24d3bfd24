"""A Python file of the user's, run so that what it registers, tasks or edits, can be named by flags."""

from __future__ import annotations

import runpy
from functools import lru_cache
from pathlib import Path

from .errors import UserError, in_words


def run_module(path: str) -> None:
    """Run it, once as it is; :class:`UserError` where there is none, or where it fails."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"cannot read the task module '{path}': No such file or directory")
    _run(path, file.stat().st_mtime_ns, file.stat().st_size)


@lru_cache
def _run(path: str, _changed: int, _size: int) -> None:
    try:
        runpy.run_path(str(Path(path).expanduser()))
    except Exception as error:
        raise UserError(f"the task module '{path}' fails: {in_words(error)}") from error
