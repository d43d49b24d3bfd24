"""What does not fit is refused or said: labels of another task, a folder with an adapter, a short context, unused settings;
and accumulated batches, numbered classes and limits mean what they say."""

from __future__ import annotations

import json

import pytest
import transformers
from shell import fails
from tiny import make, save_bert

from fastreft.cli import main
from fastreft.settings import EMBEDDED_PATH
from fastreft.tasks.methods import divides_by_all_tokens
from fastreft.tasks.run_log import read_log
from fastreft.tasks.sets import registry
from fastreft.tasks.trained import load_trained

pytestmark = pytest.mark.default_start

QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", "--report_to", "none"]
WORDS = "good bad dull fine".split()


@pytest.fixture
def bert(tmp_path):
    return save_bert(tmp_path / "bert", WORDS)


@pytest.fixture
def films(tmp_path):
    """Tables in SST-2's and in CoLA's layout."""
    for name in ("SST-2", "CoLA"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        rows = [f"{WORDS[i % 4]} {WORDS[i * 7 // 4 % 4]}\t{i % 4 % 3 % 2}" for i in range(24)]
        for split in ("train", "dev"):
            lines = ["sentence\tlabel", *rows] if name == "SST-2" else [f"x\t{r[-1]}\t\t{r[:-2]}" for r in rows]
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "data")


def sst2(bert, films, out, *more):
    where = [
        "--model",
        bert,
        "--task",
        "sst2",
        "--data_dir",
        films,
        "--output_dir",
        str(out),
        "--learning_rate",
        "1e-2",
    ]
    return ["train", *where, "--max_steps", "3", *QUICK, *more]


@pytest.mark.parametrize("task", ["classify", "smoothed"])
def test_accumulated_batches_are_one_batch(bert, films, tmp_path, task):
    """Trainer leaves each loss undivided where a forward takes any keyword; four batches would count fourfold. Its own smoothed
    loss is of all tokens, where each batch has as many as it likes."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": "the king", "completion": " was sad" * (1 + i % 3)}) for i in range(24))
    )
    smoothed = [
        "--label_smoothing_factor",
        "0.1",
        "--model",
        "embedded",
        "--train_file",
        str(data),
        "--dtype",
        "float32",
    ]
    for name, each, times in (("once", "8", "1"), ("four", "2", "4")):
        more = ["--per_device_train_batch_size", each, "--gradient_accumulation_steps", times]
        where = ["train", "--output_dir", str(tmp_path / name), "--max_steps", "3", "--learning_rate", "1e-2", *QUICK]
        assert (
            main([*where, *smoothed, *more] if task == "smoothed" else sst2(bert, films, tmp_path / name, *more)) == 0
        )
    once, four = ([x for x in read_log(tmp_path / name)["history"] if "loss" in x] for name in ("once", "four"))
    assert len(once) == 3
    for one, other in zip(once, four, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=2e-3)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


@pytest.mark.parametrize(("kind", "divides"), [("llama", True), ("gpt2", True), ("bert", False), ("bert-cls", False)])
def test_which_losses_are_of_all_tokens(kind, divides):
    assert divides_by_all_tokens(make(kind)) is divides


def test_a_whole_model_is_not_put_beside_an_adapter(bert, films, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(sst2(bert, films, out)) == 0
    fails(main(sst2(bert, films, out, "--method", "full")), capsys, "output_dir", "holds an adapter")
    assert read_log(out)["method"] == "reft"


def test_what_was_trained_otherwise_is_not_scored(bert, films, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(sst2(bert, films, out)) == 0
    flags = ["eval", "--adapter", str(out), "--data_dir", films]
    fails(main([*flags, "--task", "cola"]), capsys, "'cola' are unacceptable, acceptable", "negative, positive")
    fails(main([*flags, "--task", "boolq"]), capsys, "was trained to classify, and 'boolq' is to generate")
    fails(main([*flags, "--task", "stsb"]), capsys, "'stsb' is to regress")
    assert main([*flags, "--predictions", str(tmp_path / "p.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert {row["answer"] for row in rows} == {"negative", "positive"}
    assert all((row["found"] == row["answer"]) is row["right"] for row in rows)


def test_settings_of_reft_with_another_method_are_said(bert, films, tmp_path, capsys):
    more = ["--method", "lora", "--r", "8", "--positions", "l1", "--r_lr_scale", "5"]
    lora = ["--method_config", '{"target_modules": ["query"]}']
    assert main(sst2(bert, films, tmp_path / "out", *more, *lora)) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: of ReFT")]
    assert all(name in note for name in ("lora", "r,", "positions", "r_lr_scale")) and "dropout" not in note
    assert main(sst2(bert, films, tmp_path / "more", "--method", "lora", *lora)) == 0
    assert "note: of ReFT" not in capsys.readouterr().out


def test_numbered_classes_are_names(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_SETS", dict(registry._SETS))
    (tmp_path / "mine.py").write_text(
        "from fastreft.tasks.sets import Record, register\n"
        "@register('stars', kind='classify')\n"
        "def stars(split, folder):\n"
        f"    for i in range(36):\n        yield Record({WORDS}[i % 4], answer=2 + i % 4 * 4)\n"  # 2, 6, 10, 14
        "@register('truth', kind='classify')\n"
        "def truth(split, folder):\n"
        f"    for i in range(8):\n        yield Record({WORDS}[i % 4], answer=i % 2 == 0)\n"
    )
    mine = ["--model", bert, "--task_module", str(tmp_path / "mine.py"), "--learning_rate", "3e-2", *QUICK]
    out = tmp_path / "stars"
    assert main(["train", *mine, "--task", "stars", "--max_steps", "60", "--output_dir", str(out)]) == 0
    assert read_log(out)["labels"] == ["10", "14", "2", "6"] and read_log(out)["scores"]["stars"]["accuracy"] == 100
    model, tokenizer, *_ = load_trained(str(out))
    found = model(**tokenizer(WORDS, return_tensors="pt")).logits.argmax(-1).tolist()
    assert [model.config.id2label[i] for i in found] == ["2", "6", "10", "14"]
    assert main(["train", *mine, "--task", "truth", "--max_steps", "2", "--output_dir", str(tmp_path / "truth")]) == 0
    assert read_log(tmp_path / "truth")["labels"] == ["False", "True"]


def test_a_limit_holds_for_a_file_to_evaluate_on(tmp_path, capsys):
    data, out = tmp_path / "data.jsonl", str(tmp_path / "out")
    data.write_text("\n".join(json.dumps({"prompt": f"the king {i}", "completion": " was"}) for i in range(12)))
    files = ["--train_file", str(data), "--eval_file", str(data)]
    run = ["train", "--model", "embedded", *files, "--output_dir", out, "--max_steps", "1", *QUICK]
    assert main([*run, "--max_eval_records", "3", "--learning_rate", "1e-3"]) == 0
    evaluation = read_log(out)["evaluation"]
    records = evaluation["eval_samples_per_second"] * evaluation["eval_runtime"]
    assert records == pytest.approx(3, rel=0.05)


def test_of_a_family_what_is_there_is_scored(tmp_path, capsys):
    folder = tmp_path / "data" / "boolq"
    folder.mkdir(parents=True)
    row = {"instruction": "Is it so?", "input": "", "output": "", "answer": "true"}
    (folder / "test.json").write_text(json.dumps([row]))
    asked = ["eval", "--base", "--model", "embedded", "--task", "commonsense", "--data_dir", str(folder.parent)]
    assert main([*asked, "--max_new_tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert "base: boolq: accuracy" in said and "note: hellaswag is not scored: " in said
    (folder / "test.json").unlink()
    fails(main(asked), capsys, "boolq is not scored", "hellaswag is not scored")


def test_what_is_written_stays_within_the_context(tmp_path, capsys):
    """Of learned positions there are so many; a prompt keeps its end."""
    folder = tmp_path / "gpt2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED_PATH)
    tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=24, n_embd=32, n_head=2, n_layer=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": "the old king was sad " * n, "completion": " yes"}) for n in (1, 9))
    )
    asked = ["eval", "--base", "--model", str(folder), "--eval_file", str(data), "--too_long", "cut"]
    assert main([*asked, "--max_new_tokens", "50"]) == 0
    said = capsys.readouterr().err
    assert "note: 1 prompts were cut to their last 12 tokens, and 12 tokens are written at most: the model's" in said
