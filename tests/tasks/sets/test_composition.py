"""Two tasks in two groups of R's rows: their records, and a training whose groups are asked alone and together."""

from __future__ import annotations

import json

import pytest
from shell import fails

from fastreft.cli import main
from fastreft.tasks import data
from fastreft.tasks.errors import UserError
from fastreft.tasks.models import load_adapter, load_base
from fastreft.tasks.run_log import read_log
from fastreft.tasks.sets import find, training_records
from fastreft.tasks.sets.composition import GERMAN, INSTRUCT
from fastreft.tasks.sets.language import language_of

GROUPS = {GERMAN: [0, 1], INSTRUCT: [2, 3]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("composition")
    endings = ["auf dem Dach.", "und geht nach Hause.", "nicht.", "mit der Katze."]
    write(
        made / "hellaswag_de.jsonl",
        [{"ctx": f"A man number {i} is", "endings_de": endings[: 4 - i % 2], "label": str(i % 4)} for i in range(6)],
    )
    write(
        made / "ultrafeedback_1k.json",
        [{"instruction": f"Say {i}.", "input": "", "output": f"This is {i}."} for i in range(4)],
    )
    rows = [{"instruction": f"Tell me of {i}.", "output": "It is.", "dataset": "x"} for i in range(3)]
    (made / "alpaca_eval.json").write_text(json.dumps(rows))
    return made


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Der Hund und die Katze sind auf dem Dach.", "de"),
        ("The dog and the cat are on the roof.", "en"),
        ("You can say »und« and »der« to it, which are German words.", "en"),
        ("Die war in?", None),  # words of both
        ("1 2 3", None),
        ("", None),
    ],
)
def test_languages(text, language):
    assert language_of(text) == language


def test_records(folder):
    records, left_out = training_records("composition", folder)
    assert left_out == 0 and [record.subspaces for record in records] == [GERMAN, INSTRUCT] * 4 + [GERMAN] * 2
    assert "### Instruction:\nA man number 0 is\n" in records[0].prompt and records[0].completion == "auf dem Dach."
    assert records[2].completion == "nicht."  # one of three: the last, as pyreft's example takes it
    both, alone = find("composition_both")[0], find("composition_german")[0]
    assert [record.subspaces for record in both.records("test", folder)] == ["german+instruct"] * 3
    assert [record.answer for record in find("composition_instruct")[0].records("test", folder)] == ["en"] * 3
    assert {record.subspaces for record in alone.records("train", folder)} == {GERMAN}
    assert both.answer_of("Das ist der Hund.") == ("de", 4) and both.same(("de", 4), "de")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ctx": "x", "endings_de": "y", "label": "0"}, "the field 'endings_de' in .* is not a list of texts"),
        ({"ctx": "x", "endings_de": ["y"], "label": None}, "the field 'label' in .* is None"),
        ({"ctx": 3, "endings_de": ["y"], "label": "0"}, "the field 'ctx'"),
        ({"text": 3}, "'instruction'"),
    ],
)
def test_odd_records(row, message, folder, tmp_path):
    write(tmp_path / "german.jsonl", [row])
    (tmp_path / "ultrafeedback.json").write_bytes((folder / "ultrafeedback_1k.json").read_bytes())
    with pytest.raises(UserError, match=message):
        training_records("composition", tmp_path)


def test_train_eval_and_generate(folder, tmp_path, capsys):
    out, given = str(tmp_path / "out"), json.dumps(GROUPS)
    train = ["train", "--task", "composition", "--data_dir", str(folder), "--model", "embedded", "--output_dir", out]
    train += [
        "--r",
        "4",
        "--positions",
        "l1",
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--use_cpu",
        "true",
    ]
    fails(main(train), capsys, "hellaswag_de.jsonl", "subspaces names 'german'; the adapter has no named subspaces")
    fails(main([*train, "--subspaces", "{"]), capsys, "subspaces is '{', which is not JSON")
    fails(main([*train, "--subspaces", '{"german": [0, 9]}']), capsys, "subspaces gives 'german' the row 9; r is 4")
    assert main([*train, "--subspaces", given, "--max_eval_records", "2"]) == 0
    said = capsys.readouterr().out
    assert all(f"composition_{name}: german " in said for name in ("german", "instruct", "both"))
    assert set(read_log(out)["scores"]) == {f"composition_{name}" for name in ("german", "instruct", "both")}
    predictions = tmp_path / "predictions.jsonl"
    evaluate = ["eval", "--adapter", out, "--base", "--data_dir", str(folder), "--max_eval_records", "2"]
    assert main([*evaluate, "--predictions", str(predictions)]) == 0
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(rows) == 12 and {row["generator"] for row in rows} == {"base", out}
    capsys.readouterr()
    texts = {}
    for group in ("german", "1", "german+instruct", None):
        more = [] if group is None else ["--subspaces", group]
        assert main(["generate", "--adapter", out, "--prompt", "The king", "--max_new_tokens", "8", *more]) == 0
        texts[group] = capsys.readouterr().out
    assert texts["german+instruct"] == texts[None]
    fails(
        main(["generate", "--adapter", out, "--prompt", "x", "--subspaces", "french"]),
        capsys,
        "subspaces names 'french'; the adapter has the subspaces german, instruct",
    )
    model = load_adapter(load_base("embedded"), out)
    assert model.peft_config["default"].subspaces == GROUPS


def test_another_method_trains_on_all_alike(folder, tmp_path, capsys):
    run = ["train", "--task", "composition", "--data_dir", str(folder), "--model", "embedded", "--method", "lora"]
    run += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu", "true", "--max_eval_records", "1"]
    assert main(run) == 0
    assert "the records name subspaces, which are ReFT's: lora trains on all alike" in capsys.readouterr().out


def test_a_file_of_ones_own(tmp_path, capsys):
    rows = [
        {"prompt": f"say {i}", "completion": " yes", "part": name} for i, name in enumerate(["a", "a+b", ["b"], [0]])
    ]
    write(tmp_path / "train.jsonl", rows)
    out = str(tmp_path / "out")
    run = ["train", "--train_file", str(tmp_path / "train.jsonl"), "--subspaces_field", "part", "--model", "embedded"]
    run += ["--r", "3", "--subspaces", "[0, 2]", "[1]", "--output_dir", out, "--max_steps", "1", "--use_cpu", "true"]
    fails(main(run), capsys, "train.jsonl", "subspaces names 'a'; the adapter has the subspaces 0, 1")
    run[run.index("[0, 2]")] = '{"a": [0, 2], "b": [1]}'
    run.remove("[1]")
    assert main([*run, "--eval_file", str(tmp_path / "train.jsonl")]) == 0
    score = ["eval", "--adapter", out, "--eval_file", str(tmp_path / "train.jsonl"), "--subspaces_field", "part"]
    assert main(score) == 0
    assert "exact match" in capsys.readouterr().out
    write(tmp_path / "train.jsonl", [*rows, {"prompt": "x", "completion": "y", "part": None}])
    fails(main(run), capsys, "train.jsonl", "has no field 'part'")


def test_a_batch_carries_them():
    pad = data.Pad(lambda records: {"n": len(records), "keys": sorted(records[0])})
    assert pad([{"input_ids": [1]}]) == {"n": 1, "keys": ["input_ids"]}
    batch = pad([{"input_ids": [1], "subspaces": [1]}, {"input_ids": [1], "subspaces": [0, 1]}])
    assert batch["subspaces"].tolist() == [[1, -1], [0, 1]] and batch["keys"] == ["input_ids"]
