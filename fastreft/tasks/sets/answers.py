"""Finding the answer in what a model wrote, by the rules of LLM-Adapters (Hu et al. 2023) and pyreft, where those can be told.

Each returns None where there is no answer, which counts as wrong and is counted as unparsed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

TRIGGER = "the correct answer is "
_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER = re.compile(r"\(?\b([A-E])\b\)?")


def choice(options: str) -> Callable[[str], str | None]:
    """The first of ``options`` ("true|false", as a regular expression of words) after "the correct answer is", or where
    that is not written, the first at all: LLM-Adapters' rule, which also reads a model that was not trained on the phrase."""
    word = re.compile(rf"\b(?:{options})\b")

    def find(text: str) -> str | None:
        at = text.find(TRIGGER)
        found = word.search(text, at + len(TRIGGER) if at >= 0 else 0)
        return found.group() if found else None

    return find


def last_number(text: str) -> float | None:
    """The last number, commas of thousands left out."""
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def letter(text: str) -> str | None:
    """The letter A to E after the last "answer is", or else the last that stands alone.

    pyreft takes the first capital A to E of any word, which is that of "Because" or "A" as an article; its rationales end
    in "The answer is (B)."
    """
    _, said, rest = text.rpartition("answer is")
    found = _LETTER.findall(rest if said else text)
    return None if not found else found[0] if said else found[-1]


EXTRACTS = "text, number, letter, a|b|c or regex:PATTERN"


def extractor(wanted: str) -> Callable[[str], Any]:
    """What ``eval --extract`` asks for: all of a text, its last number, the letter of an answer, the first of some words after
    "the correct answer is" or at all, or the last match of a pattern, its first group where it has one. ``ValueError`` else."""
    known: dict[str, Callable[[str], Any]] = {"text": str.strip, "number": last_number, "letter": letter}
    if wanted in known:
        return known[wanted]
    kind, given, pattern = wanted.partition(":")
    if given and kind == "regex":
        try:
            made = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"extract is '{wanted}', and that is no regular expression: {error}") from error

        def find(text: str) -> str | None:
            found = [match.group(1 if made.groups else 0) for match in made.finditer(text)]
            return found[-1] if found else None

        return find
    words = wanted.split("|")
    if len(words) < 2 or not all(words):
        raise ValueError(f"extract is '{wanted}'; it must be {EXTRACTS}")
    return choice("|".join(map(re.escape, words)))


def close(found: float | None, wanted: float) -> bool:
    """Whether two numbers differ by a thousandth at most, as in LLM-Adapters."""
    return found is not None and math.isfinite(found) and abs(found - wanted) <= 1e-3
