"""Positions against a slow and obvious oracle, and against pyreft's own table."""

import json

import pytest
import torch
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreft.positions import Positions, explicit_rows, parse, prompt_mask, rows

ORACLE = SHARED / "oracles" / "get_intervention_locations.json"


def chosen(prompt: list[int], positions: Positions) -> tuple[list[int], list[int]]:
    """Prefix and suffix columns of a prompt given as columns."""
    n = len(prompt)
    if positions.pyreft_compat:
        f, m = min(positions.first, n // 2), min(positions.last, n // 2)
    elif positions.two_sided:
        f, m = min(positions.first, n // 2), min(positions.last, (n + 1) // 2)
    else:
        f, m = min(positions.first, n), min(positions.last, n)
    return prompt[:f], prompt[n - m :] if m else []


@st.composite
def batches(draw):
    length = draw(st.integers(1, 12))
    masks, labels = [], []
    for _ in range(draw(st.integers(1, 4))):
        shown = draw(st.integers(0, length))
        pad = length - shown
        left = draw(st.integers(0, pad))
        masks.append([0] * left + [1] * shown + [0] * (pad - left))
        start = draw(st.integers(0, length))
        labels.append(
            [-100] * start
            + draw(st.lists(st.sampled_from([-100, 5]), min_size=length - start, max_size=length - start))
        )
    return masks, labels


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(0, 6), st.integers(0, 6), st.booleans(), st.booleans(), st.booleans())
def test_rows_are_those_of_the_oracle(data, first, last, compat, with_mask, with_labels):
    masks, labels = data
    shape = (len(masks), len(masks[0]))
    positions = Positions(first, last, pyreft_compat=compat)
    mask, label = torch.tensor(masks), torch.tensor(labels)
    prompt = prompt_mask(shape, mask if with_mask else None, label if with_labels else None)
    found = rows(positions, shape, prompt)
    if found is None:
        assert (first, last, with_mask, with_labels) == (0, 0, False, False)
        return
    assert found.dtype == torch.int64
    assert found.shape == (shape[0], first + last if first or last else shape[1])
    for b in range(shape[0]):
        end = next((s for s in range(shape[1]) if labels[b][s] != -100), shape[1]) if with_labels else shape[1]
        tokens = [s for s in range(end) if masks[b][s] or not with_mask]
        prefix, suffix = chosen(tokens, positions) if first or last else (tokens, [])
        got = [row - b * shape[1] for row in found[b].tolist() if row >= 0]
        assert got == prefix + suffix
        if first or last:  # an untied prefix and suffix are told apart by place
            assert sum(found[b, :first] >= 0) == len(prefix)


def test_everywhere_is_every_row():
    assert rows(parse("all"), (2, 3), torch.zeros(2, 3, dtype=torch.bool)) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("f1", Positions(1)),
        ("l12", Positions(0, 12)),
        ("f3+l4", Positions(3, 4)),
        ("l4+f3", Positions(3, 4)),
        ("prompt", Positions()),
        ("all", Positions(everywhere=True)),
    ],
)
def test_parse(text, wanted):
    assert vars(parse(text)) == vars(wanted)
    assert parse(text) is parse(text)  # blocks share the rows of one Positions


@pytest.mark.parametrize(
    "text", ["", "f", "f0", "f-1", "f1+f2", "f1+l1+f1", "x3", "first", "f1 + l1", "F1", "f1+", None, 3, "f01"]
)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match=r"positions is .* it must be 'fN', 'lM', 'fN\+lM'"):
        parse(text)


@pytest.mark.parametrize("window", [4, 2])
def test_a_four_dimensional_mask_says_the_same(window):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    band = torch.ones(4, 4, dtype=torch.bool).tril().triu(1 - window)
    seen = band & mask.bool()[:, None, None, :]
    assert torch.equal(prompt_mask((2, 4), seen), mask.bool())
    longer = torch.nn.functional.pad(seen, (0, 3))  # a static cache has more columns than there are tokens
    assert torch.equal(prompt_mask((2, 4), longer), mask.bool())
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert torch.equal(prompt_mask((2, 4), additive), mask.bool())
    extended = torch.zeros(2, 1, 1, 4).masked_fill(mask[:, None, None] == 0, -1e4)
    assert torch.equal(prompt_mask((2, 4), extended), mask.bool())


@pytest.mark.parametrize("name", ["attention_mask", "labels"])
def test_a_mask_of_another_shape_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 5\).*\(2, 4\).*reft_positions"):
        prompt_mask((2, 4), **{name: torch.ones(2, 5, dtype=torch.long)})


def test_explicit_rows_skip_negatives_and_repeats():
    found = explicit_rows(torch.tensor([[3, -1, 3], [0, 2, -7]], dtype=torch.int32), (2, 4))
    assert [sorted(r for r in row if r >= 0) for row in found.tolist()] == [[3], [4, 6]]
    assert found.shape == (2, 3)


def test_explicit_rows_are_shared_by_beams():
    found = explicit_rows(torch.tensor([[1], [2]]), (4, 3))
    assert found.tolist() == [[1], [4], [8], [11]]


@pytest.mark.parametrize(
    "index",
    [torch.zeros(2), torch.zeros(2, 1), torch.zeros(3, 1).long(), torch.zeros(0, 1).long(), torch.ones(2, 1) > 0],
)
def test_explicit_rows_refuse_other_shapes(index):
    with pytest.raises(ValueError, match=r"reft_positions has shape .*; it must be integers of shape \(batch, n\)"):
        explicit_rows(index, (2, 4))


def test_explicit_rows_past_the_end():
    with pytest.raises(IndexError, match="reft_positions holds 4, past the last of 4 tokens"):
        explicit_rows(torch.tensor([[1], [4]]), (2, 4))


@pytest.mark.skipif(not ORACLE.exists(), reason="pyreft's table is not beside this checkout")
def test_pyreft_compat_is_pyreft():
    for case in json.loads(ORACLE.read_text()):
        kwargs, length = case["kwargs"], case["kwargs"]["last_position"]
        positions = parse(kwargs["positions"], pyreft_compat=True)
        found = rows(positions, (1, length), None)[0]
        groups = [found]
        if not kwargs["share_weights"] and positions.two_sided:
            groups = [found[: positions.first], found[positions.first :]]
        size = len(case["locations"]) // len(groups)
        pad = -1 if kwargs["pad_mode"] == "first" else length
        for i, locations in enumerate(case["locations"]):
            wanted = sorted(set(locations) - {pad})
            assert sorted(set(groups[i // size].tolist()) - {-1}) == wanted, case
