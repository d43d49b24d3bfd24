"""Which tokens of a request a step edits: together its steps edit what one forward of the whole prompt does, each once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastreft.plan import positions
from fastreft.plan.positions import Tokens
from fastreft.plan.spec import parse
from fastreft.serving.rows import of_step

KINDS = ["f2", "l3", "f2+l3", "prompt", "all", "decode", "d2", "1:", "3:9", ":4"]


def in_one(spec, tied, prompt, total):
    """(token, intervention) of a forward of everything."""
    if spec.everywhere or spec.written:
        labels = torch.where(torch.arange(total) < prompt, -100, 0)[None]
        found = positions.rows(spec, Tokens((1, total), labels=labels), tied)
        return {(i, 0) for rows in found for i in (range(total) if rows is None else rows[0].tolist()) if i >= 0}
    found = positions.rows(spec, Tokens((1, prompt)), tied)
    return {
        (i, share)
        for share, rows in enumerate(found)
        for i in (range(prompt) if rows is None else rows[0].tolist())
        if i >= 0
    }


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("tied", [True, False, "position"])
@given(prompt=st.integers(1, 12), written=st.integers(0, 5), cuts=st.sets(st.integers(1, 16)), compat=st.booleans())
def test_the_steps_edit_what_one_forward_does(text, tied, prompt, written, cuts, compat):
    spec, total = parse(text, pyreft_compat=compat), prompt + written
    ends = sorted({c for c in cuts if c < total} | {total})
    found = [each for a, b in zip([0, *ends], ends, strict=False) for each in of_step(spec, tied, prompt, a, b)]
    assert len(found) == len(set(found)) and set(found) == in_one(spec, tied, prompt, total)


def test_a_decode_step_of_a_prompts_edit_has_nothing_to_do():
    assert of_step(parse("f5+l5"), True, 40, 40, 41) == [] == of_step(parse("prompt"), True, 40, 50, 51)
    assert of_step(parse("d3"), True, 40, 43, 44) == [] == of_step(parse(":40"), True, 40, 40, 41)
