"""The metrics of the tasks, of predictions and answers in the same order, in percent; words are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .entities import entity_f1, token_accuracy

Values = Sequence[Any] | np.ndarray


def accuracy(found: Values, wanted: Values) -> float:
    """How many are the same."""
    return 100 * float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))


def leading_matches(found: Sequence[Any], wanted: Sequence[Any]) -> int:
    """How many are the same before the first that is not."""
    differs = (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b)
    return next(differs, min(len(found), len(wanted)))


def prefix(found: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Any]]) -> float:
    """How much of each is right before its first mistake, the mean over them."""
    return 100 * float(np.mean([leading_matches(a, b) / len(b) for a, b in zip(found, wanted, strict=True)]))


def pearson(found: Values, wanted: Values) -> float:
    """The correlation of two rows of numbers; 0 where one of them is constant."""
    a, b = np.asarray(found, float), np.asarray(wanted, float)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return 100 * float(a @ b) / scale if scale > 0 else 0.0


def spearman(found: Values, wanted: Values) -> float:
    """The correlation of ranks, equal values sharing their mean rank."""
    return pearson(_ranks(found), _ranks(wanted))


def matthews(found: Values, wanted: Values) -> float:
    """Matthews' correlation of two classes numbered 0 and 1, which is Pearson's of the numbers."""
    return pearson(found, wanted)


def f1(found: Values, wanted: Values) -> float:
    """F1 of class 1; 0 where it is neither found nor wanted."""
    a, b = np.asarray(found) == 1, np.asarray(wanted) == 1
    total = int(a.sum() + b.sum())
    return 100 * 2 * int((a & b).sum()) / total if total else 0.0


def german(found: Sequence[tuple[str | None, int]], wanted: Values) -> float:
    """How many texts, of which (language, words) is known, are German."""
    return 100 * float(np.mean([language == "de" for language, _ in found]))


def words(found: Sequence[tuple[str | None, int]], wanted: Values) -> float:
    """How many words they have, the mean over them."""
    return float(np.mean([count for _, count in found]))


def _ranks(values: Values) -> np.ndarray:
    _, place, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy,
    "exact match": accuracy,
    "f1": f1,
    "prefix": prefix,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "german": german,
    "words": words,
    "entity_f1": entity_f1,
    "token_accuracy": token_accuracy,
}
