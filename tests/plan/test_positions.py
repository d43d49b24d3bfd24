"""Positions against a slow and obvious oracle, and against pyreft's own table."""

import json

import pytest
import torch
from common import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from fastreft.ops import prompts
from fastreft.plan.inputs import marks, packing
from fastreft.plan.positions import Tokens, check_mask, explicit_rows, rows, tokens_of
from fastreft.plan.spec import Positions, parse

ORACLE = SHARED / "oracles" / "get_intervention_locations.json"
KINDS = ["f1", "f3", "l1", "l4", "f2+l3", "f5+l5", "prompt", "decode", "all", "d1", "d3", "1:", "2:5", ":3"]


# ---- the oracle: plain Python, one sequence at a time ----------------------------------------------------------------


def places_of(text: str, length: int, compat: bool) -> list[int | None]:
    """The place that each token of a prompt of so many tokens has among N + M, or None; 'prompt' has one place."""
    if text == "prompt":
        return [0] * length
    counts = {part[0]: int(part[1:]) for part in text.split("+")}
    first, last = counts.get("f", 0), counts.get("l", 0)
    if compat:
        f, m = min(first, length // 2), min(last, length // 2)
    elif first and last:
        f, m = min(first, length // 2), min(last, (length + 1) // 2)
    else:
        f, m = min(first, length), min(last, length)
    found: list[int | None] = [None] * length
    for k in range(f):
        found[k] = k
    for k in range(m):
        found[length - 1 - k] = first + last - 1 - k
    return found


def edited(text: str, tied, compat: bool, shown: list[int], labels: list[int] | None) -> dict[int, int]:
    """Column of a sequence -> the intervention that edits it."""
    length = len(shown)
    if text == "all":
        return dict.fromkeys(range(length), 0)
    if ":" in text:
        begin, end = (int(part) if part else None for part in text.split(":"))
        return dict.fromkeys([s for s in range(length) if shown[s]][begin:end], 0)
    if text[0] == "d":
        written = [s for s in range(length) if labels is not None and shown[s] and labels[s] != -100]
        return dict.fromkeys(written if text == "decode" else written[: int(text[1:])], 0)
    end = length if labels is None else next((s for s in range(length) if labels[s] != -100), length)
    prompt = [s for s in range(end) if shown[s]]
    first = int(text[1 : text.find("+")]) if "+" in text else None
    group = {}
    for s, place in zip(prompt, places_of(text, len(prompt), compat), strict=True):
        if place is not None:
            group[s] = place if tied == "position" else int(not tied and first is not None and place >= first)
    return group


@st.composite
def sequences(draw, longest=9):
    """A sequence's shown tokens (a run of ones with padding round it, or any) and labels."""
    length = draw(st.integers(1, longest))
    shown = draw(st.integers(0, length))
    left = draw(st.integers(0, length - shown))
    start = draw(st.integers(0, length))
    tail = draw(st.lists(st.sampled_from([-100, 5]), min_size=length - start, max_size=length - start))
    run = [0] * left + [1] * shown + [0] * (length - shown - left)
    some = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    return draw(st.one_of(st.just(run), some)), [-100] * start + tail


def row_groups(found, batch: int, length: int) -> dict[int, int]:
    """Row -> intervention, of what rows() gave; no row may come twice."""
    out = {}
    for group, index in enumerate(found):
        listed = range(batch * length) if index is None else [row for row in index.flatten().tolist() if row >= 0]
        for row in listed:
            assert row not in out
            out[row] = group
    return out


CASES = (st.sampled_from(KINDS), st.sampled_from([True, False, "position"]), st.booleans())
DTYPES = st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8, torch.bool, torch.float32])
ODD_NUMBERS = (
    "d d0 d-1 d01 d1000001 d1+f1 D3 : :0 4:4 5:4 -2: :-1 1:2:3 1:2: 01:2 1000001: :1000001 1:2+l1 \u0661:".split()
)
WAYS = pytest.mark.parametrize("way", ["native", "torch"])


def choose(way: str, monkeypatch) -> None:
    """Have the rows found by the native op or by torch."""
    if way == "torch":
        monkeypatch.setattr(prompts, "finds_rows", lambda *_: False)
    elif not prompts.finds_rows(None, None, torch.device("cpu")):
        pytest.skip("the native core is not built, or not in use")


@WAYS
@settings(max_examples=200, deadline=None)
@given(st.lists(sequences(), min_size=1, max_size=4), *CASES, st.booleans(), st.booleans(), DTYPES, st.booleans())
def test_rows_of_padded_batches(way, batch, text, tied, compat, with_mask, with_labels, dtype, transposed):
    length = max(len(shown) for shown, _ in batch)
    batch = [(s + [0] * (length - len(s)), y + [-100] * (length - len(y))) for s, y in batch]
    mask, labels = (torch.tensor(list(part)) for part in zip(*batch, strict=True))
    spec, shape = parse(text, pyreft_compat=compat), tuple(mask.shape)
    mask = mask.to(dtype)
    if transposed:  # in memory
        mask, labels = mask.T.contiguous().T, labels.T.contiguous().T
    tokens = tokens_of(shape, mask if with_mask else None, labels if with_labels else None)
    with pytest.MonkeyPatch.context() as patch:
        choose(way, patch)
        found = rows(spec, tokens, tied)
    wanted = {}
    for b, (shown, y) in enumerate(batch):
        one = edited(text, tied, compat, shown if with_mask else [1] * length, y if with_labels else None)
        wanted |= {b * length + s: group for s, group in one.items()}
    assert row_groups(found, *shape) == wanted
    places = spec.places if tied == "position" else spec.within(length).places
    for index in found:
        assert index is None or index.dtype == torch.int64
        if index is not None and spec.places:  # shapes fixed by N, M, B and S
            assert index.shape == (shape[0], places if len(found) == 1 else index.shape[1])
    assert not spec.places or sum(index.shape[1] for index in found) == places


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(sequences(6), min_size=1, max_size=4), min_size=1, max_size=3),
    *CASES,
    st.booleans(),
    st.sampled_from(["position_ids", "seq_idx", "cu_seq_lens_q"]),
)
def test_rows_of_packed_batches(batch, text, tied, compat, with_labels, said_by):
    batch = batch[:1] if said_by == "cu_seq_lens_q" else batch
    length = max(sum(len(y) for _, y in row) for row in batch)
    batch = [row + [([1], [-100])] * (length - sum(len(y) for _, y in row)) for row in batch]
    labels = torch.tensor([[label for _, y in row for label in y] for row in batch])
    said = {
        "position_ids": torch.tensor([[s for _, y in row for s in range(len(y))] for row in batch]),
        "seq_idx": torch.tensor([[i for i, (_, y) in enumerate(row) for _ in y] for row in batch], dtype=torch.int32),
        "cu_seq_lens_q": torch.tensor([0] + [len(y) for _, y in batch[0]]).cumsum(0).int(),
    }[said_by]
    spec, shape = parse(text, pyreft_compat=compat), tuple(labels.shape)
    tokens = tokens_of(shape, None, labels if with_labels else None, *packing(None, marks({said_by: said}), shape))
    found = rows(spec, tokens, tied)
    wanted, most = {}, max(len(row) for row in batch)
    for b, row in enumerate(batch):
        start = b * length
        for _, y in row:
            one = edited(text, tied, compat, [1] * len(y), y if with_labels else None)
            wanted |= {start + s: group for s, group in one.items()}
            start += len(y)
    assert row_groups(found, *shape) == wanted
    if spec.places or spec.end is not None:  # a sequence has no more
        each = spec.places or spec.end - spec.begin
        assert all(index.shape[1] <= min(length, most * each) for index in found)


@settings(max_examples=100, deadline=None)
@given(st.lists(sequences(), min_size=1, max_size=3), *CASES, st.data())
def test_windows_are_parts_of_the_whole(batch, text, tied, compat, data):
    length = max(len(shown) for shown, _ in batch)
    mask = torch.tensor([s + [0] * (length - len(s)) for s, _ in batch])
    labels = torch.tensor([y + [-100] * (length - len(y)) for _, y in batch])
    start = data.draw(st.integers(0, length - 1))
    size = data.draw(st.integers(1, length - start))
    spec, shape = parse(text, pyreft_compat=compat), tuple(mask.shape)
    whole = row_groups(rows(spec, Tokens(shape, mask, labels), tied), *shape)
    part = row_groups(rows(spec, Tokens(shape, mask, labels, window=(start, size)), tied), len(batch), size)
    columns = {divmod(row, length): group for row, group in whole.items()}
    assert part == {b * size + s - start: g for (b, s), g in columns.items() if start <= s < start + size}


def test_a_mask_beside_the_places_means_one_sequence_a_row():
    mask = torch.tensor([[0, 0, 1, 1, 1]])  # left padding gives places that jump, too
    assert packing(mask, marks({"position_ids": torch.tensor([[0, 0, 0, 1, 2]])}), (1, 5)) == (None, None)


def test_multimodal_places_pack_by_the_texts():
    text = torch.tensor([[0, 1, 0, 1]])
    starts, many = packing(None, marks({"position_ids": text.expand(4, 1, 4)}), (1, 4))
    assert starts.tolist() == [[True, False, True, False]] and many is None
    assert packing(None, marks({"position_ids": text.expand(3, 1, 4)}), (1, 4)) == (None, None)


def test_a_hidden_sample_is_not_edited():
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    assert rows(parse("f1+l1"), tokens_of((2, 3), mask))[0].tolist() == [[-1, -1], [4, 5]]
    assert (rows(parse("f1+l1"), tokens_of((2, 3), mask * 0))[0] == -1).all()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("f1", Positions(1)),
        ("l12", Positions(0, 12)),
        ("f3+l4", Positions(3, 4)),
        ("l4+f3", Positions(3, 4)),
        ("prompt", Positions()),
        ("decode", Positions(written=True)),
        ("all", Positions(everywhere=True)),
        ("d7", Positions(written=True, end=7)),
        ("1:", Positions(everywhere=True, begin=1)),
        ("0:4", Positions(everywhere=True, end=4)),
        (":4", Positions(everywhere=True, end=4)),
        ("12:1000000", Positions(everywhere=True, begin=12, end=1_000_000)),
        ("0:", Positions(everywhere=True)),
    ],
)
def test_parse(text, wanted):
    assert vars(parse(text)) == vars(wanted)
    assert parse(text) is parse(text)  # blocks share the rows of one Positions
    assert vars(parse(str(wanted))) == vars(wanted)


@pytest.mark.parametrize(
    "text",
    ["", "f", "f0", "f-1", "f1+f2", "f1+l1+f1", "x3", "first", "f1 + l1", "F1", "f1+", None, 3, "f01", *ODD_NUMBERS],
)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match=r"positions is .* it must be 'fN', 'lM', 'fN\+lM'"):
        parse(text)


@pytest.mark.parametrize("window", [4, 2])
def test_a_four_dimensional_mask_says_the_same(window):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    band = torch.ones(4, 4, dtype=torch.bool).tril().triu(1 - window)
    seen = band & mask.bool()[:, None, None, :]
    assert torch.equal(tokens_of((2, 4), seen).prompt, mask.bool())
    longer = torch.nn.functional.pad(seen, (0, 3))  # a static cache has more columns than there are tokens
    assert torch.equal(tokens_of((2, 4), longer).prompt, mask.bool())
    additive = torch.zeros(2, 1, 4, 4).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert torch.equal(tokens_of((2, 4), additive).prompt, mask.bool())
    extended = torch.zeros(2, 1, 1, 4).masked_fill(mask[:, None, None] == 0, -1e4)
    assert torch.equal(tokens_of((2, 4), extended).prompt, mask.bool())


@pytest.mark.parametrize("name", ["attention_mask", "labels"])
def test_a_mask_of_another_shape_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 5\).*\(2, 4\).*reft_positions"):
        tokens_of((2, 4), **{name: torch.ones(2, 5, dtype=torch.long)})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.bool, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_hidden_sample_is_named(dtype, transposed):
    mask = torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]).to(dtype)
    mask = mask.T.contiguous().T if transposed else mask
    check_mask(mask[:2])
    with pytest.raises(ValueError, match=r"^attention_mask hides every token of sample 2; "):
        check_mask(mask)


def test_explicit_rows_skip_negatives_and_repeats():
    found = explicit_rows(torch.tensor([[3, -1, 3], [0, 2, -7]], dtype=torch.int32), Tokens((2, 4)))
    assert [sorted(r for r in row if r >= 0) for row in found.tolist()] == [[3], [4, 6]]
    assert found.shape == (2, 3)


def test_explicit_rows_are_shared_by_beams():
    found = explicit_rows(torch.tensor([[1], [2]]), Tokens((4, 3)))
    assert found.tolist() == [[1], [4], [8], [11]]


@pytest.mark.parametrize(
    "index",
    [torch.zeros(2), torch.zeros(2, 1), torch.zeros(3, 1).long(), torch.zeros(0, 1).long(), torch.ones(2, 1) > 0],
)
def test_explicit_rows_refuse_other_shapes(index):
    with pytest.raises(ValueError, match=r"reft_positions has shape .*; it must be integers of shape \(batch, n\)"):
        explicit_rows(index, Tokens((2, 4)))


def test_explicit_rows_past_the_end():
    with pytest.raises(IndexError, match="reft_positions holds 4, past the last of 4 tokens"):
        explicit_rows(torch.tensor([[1], [4]]), Tokens((2, 4)))


@pytest.mark.skipif(not ORACLE.exists(), reason="pyreft's table is not beside this checkout")
def test_pyreft_compat_is_pyreft():
    for case in json.loads(ORACLE.read_text()):
        kwargs, length = case["kwargs"], case["kwargs"]["last_position"]
        positions = parse(kwargs["positions"], pyreft_compat=True)
        groups = [index[0] for index in rows(positions, Tokens((1, length)), kwargs["share_weights"])]
        size = len(case["locations"]) // len(groups)
        pad = -1 if kwargs["pad_mode"] == "first" else length
        for i, locations in enumerate(case["locations"]):
            wanted = sorted(set(locations) - {pad})
            assert sorted(set(groups[i // size].tolist()) - {-1}) == wanted, case
