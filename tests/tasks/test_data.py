"""Reading, checking and tokenising training data."""

from __future__ import annotations

import json

import pytest

from fastreft.tasks.data import IGNORED, encode_written
from fastreft.tasks.errors import UserError
from fastreft.tasks.flags.data import DataArguments
from fastreft.tasks.models import load_tokenizer
from fastreft.tasks.read import read_records
from fastreft.tasks.records import gather
from fastreft.tasks.sets import Record

MODEL = "embedded"
RECORD = {"prompt": "The king was sad.", "completion": ' "I am sad," said the king.'}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(path, tokenizer, max_length=64, **fields):
    encoded = encode_written(gather(DataArguments(train_file=path, **fields)).train, tokenizer, max_length=max_length)
    return encoded.data, encoded.cut


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "list.json", "a.csv", "a.tsv"])
def test_every_format_gives_the_same_records(tmp_path, name):
    other = {"prompt": "Two\nlines, and a comma", "completion": "yes"}
    if name.endswith("sv"):
        mark = "," if name.endswith("csv") else "\t"
        rows = [
            ["prompt", "completion"],
            *([f'"{r[k]}"'.replace('"I', '""I').replace(',"', ',""') for k in r] for r in [RECORD, other]),
        ]
        text = "\ufeff" + "\n".join(mark.join(row) for row in rows)
    elif name == "list.json":
        text = json.dumps([RECORD, other], indent=1)
    else:
        text = "\n\n".join(map(json.dumps, [RECORD, other])) + "\n"
    assert [record for _, record in read_records(write(tmp_path / name, text))] == [RECORD, other]


def test_labels_leave_the_prompt_out_and_end_the_completion(tmp_path, tokenizer):
    data, cut = load(write(tmp_path / "a.jsonl", json.dumps(RECORD)), tokenizer)
    ids, labels = data[0]["input_ids"], data[0]["labels"]
    prompt = tokenizer(RECORD["prompt"]).input_ids
    assert cut == 0
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert labels[len(prompt) :] == ids[len(prompt) :]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[len(prompt) : -1]) == RECORD["completion"]


def test_long_completions_are_cut_and_counted(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", json.dumps(RECORD))
    prompt = len(tokenizer(RECORD["prompt"]).input_ids)
    data, cut = load(path, tokenizer, max_length=prompt + 2)
    assert cut == 1
    assert len(data[0]["input_ids"]) == prompt + 2
    assert data[0]["labels"][-1] != tokenizer.eos_token_id
    with pytest.raises(UserError, match=r"line 1 of .* leaves no room"):
        load(path, tokenizer, max_length=prompt)


@pytest.mark.parametrize("apart", [False, True])
def test_the_first_tokens_of_each_completion_alone(tokenizer, apart):
    records = [Record("Say it.", " The king was old and tired."), Record("Say it.", " No.")]
    whole = encode_written(records, tokenizer, max_length=64, apart=apart).data
    short = encode_written(records, tokenizer, max_length=64, apart=apart, completion_tokens=3).data
    for long, cut in zip(whole, short, strict=True):
        answer = [label for label in long["labels"] if label != IGNORED]
        assert [label for label in cut["labels"] if label != IGNORED] == answer[:3]
        assert cut["input_ids"] == (long["input_ids"] if apart else long["input_ids"][: len(cut["labels"])])


def test_messages_go_through_the_chat_template(tmp_path, tokenizer, monkeypatch):
    turns = [{"role": "user", "content": "Who is sad?"}, {"role": "assistant", "content": "The king."}]
    path = write(tmp_path / "a.jsonl", json.dumps({"turns": turns}))
    with pytest.raises(UserError, match="tokenizer has none"):
        load(path, tokenizer, messages_field="turns")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    data, _ = load(path, tokenizer, messages_field="turns")
    labels = [label for label in data[0]["labels"] if label != IGNORED]
    assert tokenizer.decode(labels) == f"The king.{tokenizer.eos_token}\n"
    assert tokenizer.decode(data[0]["input_ids"]).endswith(f"[assistant] The king.{tokenizer.eos_token}\n")
    with pytest.raises(UserError, match="ends with the assistant's"):
        load(write(tmp_path / "b.jsonl", json.dumps({"turns": turns[:1]})), tokenizer, messages_field="turns")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n\n{"prompt": "a",}\n', "bad JSON in line 3"),
        ("a.json", '[\n{"prompt": "a"},\n{"prompt" "b"}]', "bad JSON in line 3"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completions": "b"}', "line 2 .*; did"),
        ("a.json", '[{"prompt": "a", "completion": "b"}, {"completion": "b"}]', "record 2 .* no field 'prompt'"),
        ("a.csv", "prompt,answer\na,b\n", "line 2 .* no field 'completion'"),
        ("a.csv", "prompt,completion\na,b\nc\n", "'completion' in line 3 .* is empty"),
        ("a.jsonl", '{"prompt": 5, "completion": "b"}', "'prompt' in line 1 .* is int, not text"),
        ("a.jsonl", '["a", "b"]\n', "record 1 .* not a record"),
        ("a.jsonl", '"a"\n', "line 1 .* not a record"),
        ("a.jsonl", "\n", "has no records"),
        ("a.csv", "prompt,completion\n", "has no records"),
    ],
)  # fmt: skip
def test_bad_data_is_named_with_its_line(tmp_path, tokenizer, name, text, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / name, text), tokenizer)


def test_a_file_that_is_not_there_or_not_text(tmp_path, tokenizer):
    with pytest.raises(UserError, match="cannot read the data file"):
        load(str(tmp_path / "none.jsonl"), tokenizer)
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8"):
        load(str(tmp_path / "a.jsonl"), tokenizer)
