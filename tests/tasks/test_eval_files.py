"""``fastreft eval --eval_file``: records of one's own, held to what Trainer measured of the same records in the training."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest
from shell import fails
from trained import LABELLED, write_records

from fastreft.cli import main
from fastreft.settings import EMBEDDED_PATH
from fastreft.tasks.models import load_tokenizer
from fastreft.tasks.run_log import read_log

pytestmark = pytest.mark.default_start

QUICK = ("--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", "--report_to", "none")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def data(tmp_path):
    write_records(tmp_path / "data.jsonl")
    return str(tmp_path / "data.jsonl")


def train(tmp_path, data, *flags, model="embedded"):
    """The folder of a training, and what Trainer measured at its end of the records that it trained on, in one batch."""
    out = str(tmp_path / "out")
    run = (
        "train",
        "--model",
        model,
        "--train_file",
        data,
        "--eval_file",
        data,
        "--output_dir",
        out,
        "--positions",
        "all",
    )
    assert main([*run, "--per_device_eval_batch_size", "64", "--max_length", "64", *QUICK, *flags]) == 0
    return out, read_log(out)["evaluation"]


def evaluate(tmp_path, *flags):
    """The rows of predictions."""
    rows = tmp_path / "rows.jsonl"
    assert main(["eval", *flags, "--predictions", str(rows)]) == 0
    return [json.loads(line) for line in rows.read_text().splitlines()]


def metrics(said, whose):
    """Name -> number of the line that says what somebody scored."""
    (line,) = (line for line in said.splitlines() if line.startswith(f"{whose}: data.jsonl: "))
    words = line.removeprefix(f"{whose}: data.jsonl: ").partition("   (")[0].split("   ")
    return {name: float(value) for name, value in (word.rsplit(" ", 1) for word in words)}


def test_completions(tmp_path, data, capsys):
    out, measured = train(tmp_path, data, "--max_steps", "40", "--learning_rate", "2e-2")
    capsys.readouterr()
    # in batches of other sizes than Trainer's the loss is of the tokens all the same
    rows = evaluate(tmp_path, "--adapter", out, "--base", "--eval_file", data, "--batch_size", "3")
    said = capsys.readouterr().out
    adapter, base = metrics(said, out), metrics(said, "base")
    assert adapter["loss"] == pytest.approx(measured["eval_loss"], abs=2e-4) and base["loss"] > 1 > adapter["loss"]
    assert adapter["exact match"] > 50 > base["exact match"]
    for whose, found in (("base", base), (out, adapter)):
        own = [row for row in rows if row["generator"] == whose]
        assert len(own) == 16
        assert all(row["right"] == (row["output"].strip() == row["answer"]) for row in own)
        assert found["exact match"] == pytest.approx(100 * sum(row["right"] for row in own) / 16)
    assert rows[0]["prompt"] == "The king was sad." and rows[0]["answer"] == '"I am sad," said he.'
    # a limit that cuts completions is told, as a training's is
    log = tmp_path / "out" / "training.json"
    log.write_text(json.dumps(json.loads(log.read_text()) | {"max_length": 12}))
    assert main(["eval", "--adapter", out, "--eval_file", data, "--max_eval_records", "2"]) == 0
    assert "2 records of data.jsonl were cut at max_length = 12 tokens" in capsys.readouterr().out


def test_labels(tmp_path, data, capsys):
    out, measured = train(tmp_path, data, *LABELLED, "--max_steps", "20", "--learning_rate", "2e-2")
    capsys.readouterr()
    rows = evaluate(tmp_path, "--adapter", out, "--eval_file", data, *LABELLED)
    found = metrics(capsys.readouterr().out, out)
    assert {*found} == {"accuracy"} and found["accuracy"] == pytest.approx(measured["eval_accuracy"], abs=0.01)
    assert found["accuracy"] > 25 and {row["found"] for row in rows} <= {"sad", "happy", "old", "cold"}
    for flags, part in (
        ([], "was trained to classify, and"),
        (["--text_field", "prompt", "--label_field", "completion"], "is none of the 4 labels that there are"),
    ):
        fails(main(["eval", "--adapter", out, "--eval_file", data, *flags]), capsys, part)


def test_conversations(tmp_path, data, capsys, monkeypatch):
    records = map(json.loads, (tmp_path / "data.jsonl").read_text().splitlines())
    turns = [[("user", record["prompt"]), ("assistant", record["completion"].strip())] for record in records]
    rows = [{"talk": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_PATH, model)
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    talk = ("--messages_field", "talk")
    out, measured = train(tmp_path, data, *talk, "--max_steps", "40", "--learning_rate", "2e-2", model=str(model))
    capsys.readouterr()
    written = evaluate(tmp_path, "--adapter", out, "--eval_file", data, *talk)
    found = metrics(capsys.readouterr().out, out)
    assert found["loss"] == pytest.approx(measured["eval_loss"], abs=2e-4) and found["exact match"] > 50
    assert written[0]["messages"] == rows[0]["talk"][:1] and written[0]["answer"] == '"I am sad," said he.'
    # and it is talked to: each question behind what was said, an empty line beginning anew
    asked = [rows[0]["talk"][0]["content"], "And now?", "", rows[0]["talk"][0]["content"]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(asked)))
    capsys.readouterr()
    assert main(["chat", "--adapter", out, "--max_new_tokens", "24"]) == 0
    first, *_, last = [line.strip("> ") for line in capsys.readouterr().out.splitlines() if line.strip("> ")]
    assert first == last == written[0]["output"].strip()
    assert "base_model: " not in (tmp_path / "out" / "README.md").read_text()  # which is a folder of this machine
    fails(main(["chat", "--adapter", out, "--max_new_tokens", "0"]), capsys, "max_new_tokens is 0")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--eval_file", "./none.jsonl"], "cannot read the data file './none.jsonl'"),
        (["--eval_file", "DATA", "--task", "boolq"], "task is of a task, and eval_file gives records of your own"),
        (["--eval_file", "DATA", "--split", "train"], "split is of a task"),
        (["--eval_file", "DATA", "--prompt_field", "q"], "has no field 'q'"),
        (["--eval_file", "DATA", "--text_field", "prompt"], "text_field and label_field go together"),
        (["--eval_file", "DATA", *LABELLED], "the labels of 'data.jsonl' are those of a training"),
        (["--task", "boolq", "--label_field", "how"], "label_field is a field of records of your own"),
        (["--eval_file", "EMPTY"], "has no records"),
    ],
)
def test_what_is_refused(tmp_path, data, capsys, flags, part):
    (tmp_path / "empty.jsonl").write_text("\n")
    places = {"DATA": data, "EMPTY": str(tmp_path / "empty.jsonl")}
    run = ["eval", "--base", "--model", "embedded", *(places.get(flag, flag) for flag in flags)]
    fails(main(run), capsys, part)


def test_answers_that_are_found_in_what_is_written(tmp_path, data, capsys):
    """Held to the predictions themselves; the scores are a file, too."""
    rows = [{"prompt": f"The {who} was sad.", "answer": answer} for who, answer in (("king", "he"), ("dog", "zebra"))]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, _ = train(tmp_path, data, "--max_steps", "30", "--learning_rate", "2e-2")
    flags = ["--adapter", out, "--eval_file", str(tmp_path / "asked.jsonl"), "--answer_field", "answer"]
    flags += ["--max_new_tokens", "12", "--scores", str(tmp_path / "scores.json")]
    found = evaluate(tmp_path, *flags, "--extract", "he|she|zebra")
    for row in found:
        spoken = [word for word in re.findall(r"\b(he|she|zebra)\b", row["output"])]
        assert row["found"] == (spoken[0] if spoken else None) and row["right"] == (row["found"] == row["answer"])
    assert found[0]["right"] and not found[1]["right"]
    (score,) = json.loads((tmp_path / "scores.json").read_text())
    assert score["accuracy"] == 50 and score["records"] == 2 and score["task"] == "asked.jsonl"
    (tmp_path / "none.jsonl").write_text(json.dumps({"prompt": "The king", "answer": None}))
    fails(
        main(["eval", *flags, "--eval_file", str(tmp_path / "none.jsonl")]),
        capsys,
        "field 'answer' in line 1",
        "is empty",
    )
    fails(main(["eval", *flags, "--answer_field", "anser"]), capsys, "has no field 'anser' among prompt, answer")
    fails(
        main(["eval", *flags, "--extract", "number"]), capsys, "field 'answer' in line 1", "'he', in which there is no"
    )


def test_prompts_that_are_too_long_are_left_out_of_the_loss(tmp_path, data, capsys):
    out, _ = train(tmp_path, data, "--max_steps", "2", "--learning_rate", "2e-2")
    with open(data, "a") as file:
        file.write("\n" + json.dumps({"prompt": "The king was sad. " * 30, "completion": " I am sad."}))
    capsys.readouterr()
    fails(main(["eval", "--adapter", out, "--eval_file", data]), capsys, "leaves no room", "--too_long drop")
    assert main(["eval", "--adapter", out, "--eval_file", data, "--too_long", "drop"]) == 0
    assert (
        "note: 1 records of data.jsonl were left out at max_length = 64 tokens for the loss" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--extract", "number"], ["extract finds the answer that --answer_field names"]),
        (["--answer_field", "a", "--extract", "numbers"], ["extract is 'numbers'; it must be text, number"]),
        (["--answer_field", "a", "--extract", "regex:("], ["extract is 'regex:('", "no regular expression"]),
        (["--answer_field", "a", "--messages_field", "m"], ["answer_field is of prompts"]),
        (["--max_new_tokens", "0"], ["max_new_tokens is 0"]),
        (["--scores", "scores.txt"], ["scores is 'scores.txt'"]),
    ],
)
def test_bad_answers(data, capsys, flags, parts):
    fails(main(["eval", "--base", "--model", "embedded", "--eval_file", data, *flags]), capsys, *parts)
