"""Entities in tags, by cases written by hand and by CoNLL's rule told another way; files of words with tags."""

from __future__ import annotations

import json
import random

import pytest

from fastreft.tasks.errors import UserError
from fastreft.tasks.flags.data import DataArguments
from fastreft.tasks.records import gather
from fastreft.tasks.sets import Record, find, tagged
from fastreft.tasks.sets.entities import entity_f1, spans, token_accuracy


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O", {(1, 2, "PER")}),
        ("B-PER B-PER", {(0, 0, "PER"), (1, 1, "PER")}),  # IOB2 and IOB1: neighbours are two
        ("I-PER I-PER O I-LOC", {(0, 1, "PER"), (3, 3, "LOC")}),  # IOB1: an I- begins
        ("I-PER B-PER I-PER", {(0, 0, "PER"), (1, 2, "PER")}),  # IOB1: B- between neighbours alone
        ("B-PER I-LOC", {(0, 0, "PER"), (1, 1, "LOC")}),  # another type is another entity
        ("O I-PER", {(1, 1, "PER")}),  # what no rule of IOB2 allows, and a model writes
        ("B-PER O I-PER", {(0, 0, "PER"), (2, 2, "PER")}),
        ("B-PER I-PER E-PER S-LOC", {(0, 2, "PER"), (3, 3, "LOC")}),  # BIOES
        ("E-PER I-PER", {(0, 0, "PER"), (1, 1, "PER")}),
        ("U-PER L-PER", {(0, 0, "PER"), (1, 1, "PER")}),  # BILOU
        ("NUM NUM O SUM", {(0, 1, "NUM"), (3, 3, "SUM")}),  # bare types: runs
        ("B I O B", {(0, 1, ""), (3, 3, "")}),  # bare prefixes
        ("B-law-no I-law-no", {(0, 1, "law-no")}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_spans(tags, found):
    assert spans(tags.split()) == found


def chunk_begins(before, tag):
    """conlleval's startOfChunk, of the tags that IOB and BIOES have."""
    if tag == "O":
        return False
    if before == "O" or before[0] in "ES" or tag[0] in "BS":
        return True
    return before[2:] != tag[2:]


def test_spans_by_conllevals_rule():
    rng = random.Random(0)
    for _ in range(300):
        tags = [rng.choice("O B-X I-X E-X S-X B-Y I-Y E-Y".split()) for _ in range(rng.randint(1, 7))]
        begins = [i for i, tag in enumerate(tags) if chunk_begins(tags[i - 1] if i else "O", tag)]
        assert sorted(start for start, *_ in spans(tags)) == begins
        for start, end, kind in spans(tags):
            assert all(tag[2:] == kind for tag in tags[start : end + 1])
            after = tags[end + 1] if end + 1 < len(tags) else "O"
            assert after == "O" or chunk_begins(tags[end], after)


def test_f1_and_accuracy_of_words():
    wanted = ["B-PER I-PER O B-LOC".split(), "B-LOC O".split()]
    found = ["B-PER O O B-LOC".split(), "B-ORG O".split()]  # a last word missed, a right one, a wrong type
    assert entity_f1(found, wanted) == pytest.approx(100 * 2 * 1 / (3 + 3))
    assert token_accuracy(found, wanted) == pytest.approx(100 * 4 / 6)
    assert entity_f1(wanted, wanted) == 100 and token_accuracy(wanted, wanted) == 100
    assert entity_f1([["I-PER", "I-PER"]], [["B-PER", "I-PER"]]) == 100  # one entity in either writing
    assert entity_f1([["O"]], [["O"]]) == 0 and entity_f1([["O"]], [["B-X"]]) == 0


CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""
SENTENCES = [Record("EU rejects", answer=("B-ORG", "O"), words=("EU", "rejects")),
             Record("Peter Blackburn", answer=("B-PER", "I-PER"), words=("Peter", "Blackburn"))]  # fmt: skip


@pytest.mark.parametrize("place", ["train.txt", "conll2003/train.txt", "eng.train"])
def test_conlls_files(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(CONLL.replace("\n", "\r\n") if place == "eng.train" else CONLL)
    assert find("CoNLL2003")[0].records("train", tmp_path) == SENTENCES


def test_the_hubs_numbers(monkeypatch):
    row = {"tokens": ["EU", "rejects"], "ner_tags": [3, 0]}
    monkeypatch.setattr("fastreft.tasks.sets.tagging.from_hub", lambda *_, **__: iter([row]))
    assert find("conll2003")[0].records("validation", None) == SENTENCES[:1]


def read(path, text, label):
    return gather(DataArguments(train_file=str(path), text_field=text, label_field=label))


def test_files_of_ones_own(tmp_path):
    columns, tabs, lists = tmp_path / "a.conll", tmp_path / "a.tsv", tmp_path / "a.jsonl"
    columns.write_text(CONLL)
    tabs.write_text('New York\tB-LOC\n"\tO\n\n10\u00a0000\tB-NUM\n')  # a blank and a quote are parts of words
    lists.write_text(json.dumps({"words": ["EU", "rejects"], "tags": ["B-ORG", "O"]}))
    assert read(columns, "1", "-1").train == SENTENCES
    assert read(columns, "1", "2").labels == ("NNP", "VBZ") and read(columns, "1", "2").metrics == ("token_accuracy",)
    data = read(tabs, "1", "2")
    assert [r.words for r in data.train] == [("New York", '"'), ("10\u00a0000",)] and data.kind == "tag"
    assert data.labels == ("B-LOC", "B-NUM", "O") and data.metrics == ("entity_f1", "token_accuracy")
    assert read(lists, "words", "tags").train == SENTENCES[:1]


@pytest.mark.parametrize(
    ("name", "text", "fields", "said"),
    [
        ("a.conll", "EU B\nhe\n", ("1", "-1"), "line 2 of '.*' has 1 columns, and the first has 2"),
        ("a.conll", "EU B\n", ("1", "3"), "label_field is 3, and line 1 of '.*' has 2 columns"),
        ("a.tsv", "EU\tB\n\tB\n", ("1", "2"), "column 1 in line 2 of '.*' is empty"),
        ("a.conll", "EU B\n", ("word", "tag"), "columns without names: give their numbers"),
        ("a.jsonl", '{"w": ["a", "b"], "t": ["O"]}', ("w", "t"), "line 1 of '.*' has 2 words and 1 tags"),
        ("a.jsonl", '{"w": "a b", "t": ["O", "O"]}', ("w", "t"), "the field 'w' in line 1 of '.*' is not a list of words"),
        ("a.jsonl", '{"w": ["a"], "t": [null]}', ("w", "t"), "the field 't' in line 1 of '.*' is not a list of tags"),
        ("a.jsonl", '{"w": [], "t": []}', ("w", "t"), "has 0 words and 0 tags"),
        ("a.jsonl", '{"words": ["a"], "t": ["O"]}', ("word", "t"), "has no field 'word' among words, t; did you mean 'words'"),
        ("a.jsonl", '{"w": ["a"], "t": ["O"]}', ("w", "t"), "have 1 label; classifying takes two"),
        ("a.jsonl", '{"w": ["a"], "t": ["O"]}\n{"w": "a", "t": "X"}', ("w", "t"), "line 2 of .* has one label, and the others"),
        ("a.jsonl", '{"w": "a", "t": "X"}\n{"w": ["a"], "t": ["O"]}', ("w", "t"), "line 2 of .* has a list of tags, and"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(tmp_path, name, text, fields, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        read(tmp_path / name, *fields)


def test_a_record_of_words_has_a_tag_for_each():
    assert tagged(["a", "b"], ["O", "X"]) == Record("a b", answer=("O", "X"), words=("a", "b"))
    with pytest.raises(ValueError, match="words must be those of prompt"):
        Record("a  b", answer=("O", "X"), words=("a", "b"))
