"""Entities in tagged words, and what finding them is worth, as CoNLL's own scorer counts (conlleval; Tjong Kim Sang and De
Meulder 2003): an entity is right where its first word, its last and its type are.

A tag is "O", a prefix and a type ("B-PER", "I-PER", of BIOES and BILOU also "E-", "L-", "S-" and "U-"), a bare prefix, or a
bare type, whose runs are entities. An entity begins at "B-", "S-" and "U-", but also at an "I-" with nothing of its type before
it: that reads IOB2, IOB1, in which "B-" stands between neighbours alone, and what a model writes that knows no rules.
"""

from __future__ import annotations

from collections.abc import Sequence

OUTSIDE = "O"
_BEGINS, _ENDS, _PREFIXES = "BSU", "ESLU", "BIESLU"


def _split(tag: str) -> tuple[str, str]:
    """(prefix, type)."""
    prefix, _, kind = tag.partition("-")
    return (prefix, kind) if len(prefix) == 1 and prefix in _PREFIXES else ("I", tag)


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first word, last word, type) of every entity."""
    found = set()
    start, open_kind = 0, None  # of the entity that goes on, if one does
    for i, tag in enumerate(tags):
        prefix, kind = ("", None) if tag == OUTSIDE else _split(tag)
        if open_kind is not None and (kind != open_kind or prefix in _BEGINS):
            found.add((start, i - 1, open_kind))
            open_kind = None
        if kind is not None and open_kind is None:
            start, open_kind = i, kind
        if open_kind is not None and prefix in _ENDS:
            found.add((start, i, open_kind))
            open_kind = None
    if open_kind is not None:
        found.add((start, len(tags) - 1, open_kind))
    return found


def entity_f1(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """F1 of the entities of all sentences together, 2 x right / (found + wanted), in percent; 0 where there are none."""
    pairs = [(spans(a), spans(b)) for a, b in zip(found, wanted, strict=True)]
    total = sum(len(a) + len(b) for a, b in pairs)
    return 100 * 2 * sum(len(a & b) for a, b in pairs) / total if total else 0.0


def token_accuracy(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> float:
    """How many words of all sentences together have their tag, in percent."""
    right = [a == b for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=True)]
    return 100 * sum(right) / len(right) if right else 0.0
