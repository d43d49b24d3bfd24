"""The flags of ``fastreft info``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from .parser import Parser


def parse(argv: Sequence[str]) -> Namespace:
    """:class:`fastreft.tasks.errors.UserError` for what is wrong."""
    parser = Parser([], command="fastreft info", description="Versions, the native core in use, and why.")
    parser.add_argument("--models", action="store_true", help="list the model types tested, and those that do not work")
    parser.add_argument("--tasks", action="store_true", help="list the tasks that train and eval know")
    (chosen,) = parser.parse(argv)
    return chosen
