"""The words for positions: "f5+l5" and its friends, as :class:`Positions`. Imports nothing, so that a command line may ask."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

Tied = bool | str  # True, False or "position": who shares an intervention, see Positions.shares
MOST = 1_000_000  # of N, M, K, a and b: more than a context holds
ACCEPTED = (
    "'fN', 'lM', 'fN+lM' (such as 'f5+l5'), 'prompt', 'decode', 'dK', 'a:b', 'a:', ':b' or 'all' "
    f"(N, M, K from 1, a from 0 and below b, to {MOST})"
)
_COUNT = "[1-9][0-9]{0,6}"


@dataclass(frozen=True, eq=False)  # parse() gives one object a text, so that telling two apart costs nothing
class Positions:
    """``first`` N and ``last`` M tokens of the prompt; where both are 0, all of it; or the ``written`` ones; or all.

    Of the written ones, or of all, those that have the numbers ``begin`` to ``end`` - 1 (None = no end) among them.
    """

    first: int = 0
    last: int = 0
    everywhere: bool = False
    written: bool = False
    pyreft_compat: bool = False
    begin: int = 0
    end: int | None = None

    def __str__(self) -> str:
        if self.places:
            return "+".join(f"{side}{n}" for side, n in (("f", self.first), ("l", self.last)) if n)
        if self.numbered and self.everywhere:
            return f"{self.begin or ''}:{'' if self.end is None else self.end}"
        if self.numbered:
            return f"d{self.end}"
        return "all" if self.everywhere else "decode" if self.written else "prompt"

    @property
    def places(self) -> int:
        """How many tokens of a prompt can be chosen; 0 = no fixed number."""
        return self.first + self.last

    @property
    def numbered(self) -> bool:
        """Does a token's number in its sequence decide?"""
        return self.begin > 0 or self.end is not None

    def within(self, length: int) -> Positions:
        """As they are among so many tokens: there are no more places than that on a side."""
        if max(self.first, self.last) <= length:
            return self
        return replace(self, first=min(self.first, length), last=min(self.last, length))

    def shares(self, tied: Tied) -> list[tuple[int, int]]:
        """The places, from and up to, that each intervention of a layer has, prefix first.

        One has them all if ``tied``; if not, one a side of fN+lM; and with "position" one each. A kind with no fixed
        number of places has one intervention.
        """
        if tied == "position" and self.places:
            return [(k, k + 1) for k in range(self.places)]
        if not tied and self.first and self.last:
            return [(0, self.first), (self.first, self.places)]
        return [(0, self.places)]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@lru_cache
def _parse(text: str, pyreft_compat: bool) -> Positions:
    if text == "all":
        return Positions(everywhere=True)
    if text == "decode":
        return Positions(written=True)
    if text == "prompt":
        return Positions()
    if match := re.fullmatch(rf"d({_COUNT})", text, re.ASCII):
        if int(match[1]) <= MOST:
            return Positions(written=True, end=int(match[1]))
    elif match := re.fullmatch(rf"(0|{_COUNT})?:({_COUNT})?", text, re.ASCII):
        begin, end = int(match[1] or 0), None if match[2] is None else int(match[2])
        if text != ":" and max(begin, end or 0) <= MOST and (end is None or begin < end):
            return Positions(everywhere=True, begin=begin, end=end)
    counts: dict[str, int] = {}
    for part in text.split("+"):
        match = re.fullmatch(rf"([fl])({_COUNT})", part, re.ASCII)
        if match is None or match[1] in counts or int(match[2]) > MOST:
            raise ValueError(f"positions is {_short(text)}; it must be {ACCEPTED}")
        counts[match[1]] = int(match[2])
    return Positions(counts.get("f", 0), counts.get("l", 0), pyreft_compat=pyreft_compat)


def parse(text: str, *, pyreft_compat: bool = False) -> Positions:
    """The :class:`Positions` of a text: fN, lM, fN+lM (in either order), prompt, decode, dK, a:b, a:, :b or all; else
    ``ValueError``. a:b are the shown tokens with the numbers a to b - 1, from 0, of prompt and written ones; dK the first K
    that are written, as BREP (arXiv 2511.10707) has it."""
    if not isinstance(text, str):
        raise ValueError(f"positions is {_short(text)}; it must be {ACCEPTED}")
    return _parse(text, pyreft_compat)
