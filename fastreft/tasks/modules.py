"""A Python file of the user's, run so that what it registers, tasks or edits, can be named by flags."""

from __future__ import annotations

import runpy
from functools import lru_cache
from pathlib import Path

from .errors import UserError, in_words


@lru_cache
def run_module(path: str) -> None:
    """Run it, once; :class:`UserError` where there is none, or where it fails."""
    if not Path(path).expanduser().is_file():
        raise UserError(f"cannot read the task module '{path}': No such file or directory")
    try:
        runpy.run_path(str(Path(path).expanduser()))
    except Exception as error:
        raise UserError(f"the task module '{path}' fails: {in_words(error)}") from error
