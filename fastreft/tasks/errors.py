"""Bad input: the one exception that the command line turns into a sentence and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something in the user's input is wrong; the message is one sentence that says what and where."""


@contextmanager
def user_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Inside, an exception of these kinds is about the user's input: its message becomes a :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{prefix}{in_words(error)}") from error


def in_words(error: BaseException) -> str:
    """What an exception says, on one line and of bounded length."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (KeyError, AttributeError, IndexError, RecursionError)):
        said = f"{type(error).__name__}: {said}"
    return said if len(said) <= 600 else f"{said[:597]}..."


def nearest(name: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' for the valid name nearest to ``name``, or '' where none is near."""
    found = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean '{found[0]}'?" if found else ""
