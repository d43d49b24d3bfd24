"""Answers in what a model wrote, by hand-written cases and the traps that are known."""

from __future__ import annotations

import pytest

from fastreft.tasks.sets.answers import choice, close, extractor, last_number, letter


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the correct answer is true", "true"),
        ("the correct answer is false\n\nQuestion: is true a word?", "false"),
        ("It is true that the correct answer is false", "false"),  # what stands before the phrase is no answer
        ("False", None),  # the options are as they are written
        ("true", "true"),  # a model that was not trained on the phrase
        ("untrue", None),
        ("the correct answer is ", None),
        ("", None),
    ],
)
def test_true_or_false(text, found):
    assert choice("true|false")(text) == found


def test_a_numbered_answer_is_a_whole_word():
    find = choice("answer[1-4]")
    assert find("the correct answer is answer1") == "answer1"
    assert find("the correct answer is answer10") is None
    assert find("the correct answer is answer5, or answer2") == "answer2"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so 12 + 3 = 15. The answer is 15.", 15.0),
        ("The answer is 1,234.5 dollars", 1234.5),
        ("it costs $3.50", 3.5),
        ("minus: -15", -15.0),
        ("50% of 8", 8.0),  # the last number, whatever it counts
        ("The final answer is: 7", 7.0),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text, found):
    assert last_number(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Because A is wrong, the answer is (C).", "C"),  # pyreft's rule finds the B of "Because"
        ("A train leaves at noon.The answer is (B).", "B"),
        ("The answer is B", "B"),
        ("(A) is not right, (D) is", "D"),
        ("The answer is (E). Or is it A?", "E"),
        ("Every Cat", None),
        ("", None),
    ],
)
def test_a_letter(text, found):
    assert letter(text) == found


def test_numbers_are_the_same_within_a_thousandth():
    assert close(1.8333, 1.8333333333333335) and not close(1.83, 1.8333333333333335)
    assert not close(None, 1.0) and not close(float("inf"), 1.0)


@pytest.mark.parametrize(
    ("extract", "text", "found"),
    [
        ("text", " four. ", "four."),
        ("number", "2 and 2 are 4.", 4.0),
        ("letter", "Because it is so, the answer is (B).", "B"),
        ("yes|no", "the correct answer is no, not yes", "no"),
        ("yes|no", "maybe", None),
        (r"regex:#### (\d+)", "#### 3\n#### 4", "4"),
        (r"regex:\d+", "none", None),
    ],
)
def test_what_eval_extracts(extract, text, found):
    assert extractor(extract)(text) == found
