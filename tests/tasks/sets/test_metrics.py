"""The metrics against values worked out by hand, and against their definitions on random data."""

from __future__ import annotations

import math
import random

import pytest

from fastreft.tasks.sets.metrics import accuracy, f1, matthews, pearson, spearman


def test_accuracy():
    assert accuracy(["a", "b", None], ["a", "c", "d"]) == pytest.approx(100 / 3)


def counted(found, wanted):
    pairs = list(zip(found, wanted, strict=True))
    return (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))


@pytest.mark.parametrize("seed", range(5))
def test_f1_and_matthews_by_their_definitions(seed):
    rng = random.Random(seed)
    wanted = [rng.randint(0, 1) for _ in range(50)]
    found = [w if rng.random() < 0.7 else 1 - w for w in wanted]
    tp, fp, fn, tn = counted(found, wanted)
    assert f1(found, wanted) == pytest.approx(100 * 2 * tp / (2 * tp + fp + fn))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(found, wanted) == pytest.approx(100 * (tp * tn - fp * fn) / root)


def test_a_constant_prediction_is_worth_nothing():
    assert matthews([1, 1, 1], [0, 1, 1]) == 0 and f1([0, 0], [0, 0]) == 0 and pearson([2, 2], [1, 3]) == 0


def test_correlations():
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(100) and pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-100)
    assert spearman([1, 2, 3, 10], [1, 4, 9, 16]) == pytest.approx(100)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: cov 4.5, variances 4.5 and 5
    assert spearman([1, 2, 2, 5], [1, 2, 3, 4]) == pytest.approx(100 * 4.5 / math.sqrt(4.5 * 5))
