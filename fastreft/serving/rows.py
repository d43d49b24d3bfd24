"""Which tokens of a request an adapter edits, of those that a step of an engine computes."""

from __future__ import annotations

from functools import lru_cache

from ..plan import positions
from ..plan.positions import Tokens
from ..plan.spec import Positions, Tied


@lru_cache(maxsize=4096)
def _of_prompt(spec: Positions, tied: Tied, length: int) -> tuple[tuple[int, ...], ...]:
    """The places, from 0, that each intervention edits of a prompt of so many tokens."""
    found = positions.rows(spec, Tokens((1, length)), tied)
    return tuple(
        tuple(range(length)) if rows is None else tuple(i for i in rows[0].tolist() if i >= 0) for rows in found
    )


def of_step(spec: Positions, tied: Tied, prompt: int, start: int, end: int) -> list[tuple[int, int]]:
    """(token, intervention) of the tokens from ``start`` up to ``end``, counted from the request's first, of which ``prompt``
    are its prompt. What came before ``start`` was edited when it was computed, and what is computed again is edited again."""
    if spec.everywhere or spec.written:
        counted = 0 if spec.everywhere else prompt  # the token that has the number 0
        last = end if spec.end is None else min(end, counted + spec.end)
        return [(token, 0) for token in range(max(start, counted + spec.begin), last)]
    if start >= prompt:
        return []
    return [
        (token, share)
        for share, chosen in enumerate(_of_prompt(spec, tied, prompt))
        for token in chosen
        if start <= token < end
    ]
