"""Training on tasks and scoring them from the command line: classifiers, writers and encoder-decoders, by any method."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from shell import fails
from tiny import save_bert

from fastreft import ReftConfig
from fastreft.cli import main
from fastreft.tasks.flags.train import MethodArguments
from fastreft.tasks.methods import give_head_its_rate, optimizer_of
from fastreft.tasks.run_log import read_log
from fastreft.tasks.sets import registry

pytestmark = pytest.mark.default_start

GOOD, BAD = "good fine great nice".split(), "bad poor dull awful".split()
WORDS = [*GOOD, *BAD, "a", "the", "film", "story", "is"]
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", "--report_to", "none"]


def bert(folder):
    return save_bert(folder, WORDS)


def sentences(n, start=0):
    """(text, 1 for a good film or 0), n of them, the same for the same numbers."""
    for i in range(start, start + n):
        label = i % 2
        word = (GOOD if label else BAD)[(i // 2) % 4]
        yield f"the {('film', 'story')[(i // 8) % 2]} is {word}", label


@pytest.fixture
def films(tmp_path):
    """Tables in SST-2's layout."""
    folder = tmp_path / "data" / "SST-2"
    folder.mkdir(parents=True)
    for name, n, start in (("train", 64, 0), ("dev", 16, 0)):
        rows = [f"{text}\t{label}" for text, label in sentences(n, start)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return str(folder.parent)


def number(pattern, text):
    return float(re.search(pattern, text)[1])


def test_adalora_shares_out_its_ranks(tmp_path, films):
    """Which PEFT does when it is told of every step: of 4 ranks a matrix one is left on average."""
    out = tmp_path / "out"
    config = (
        '{"total_step": 4, "tinit": 1, "tfinal": 1, "init_r": 4, "target_r": 1, "target_modules": ["query", "value"]}'
    )
    where = ["--model", bert(tmp_path / "bert"), "--task", "sst2", "--data_dir", films, "--output_dir", str(out)]
    assert main(["train", *where, "--method", "adalora", "--method_config", config, "--max_steps", "4", *QUICK]) == 0
    kept = json.loads((out / "adapter_config.json").read_text())["rank_pattern"].values()
    assert sum(map(sum, kept)) == len(kept) > 0


@pytest.mark.parametrize("method", ["reft", "lora", "ia3", "full", "head", "last"])
def test_a_classifier_by_any_method(tmp_path, films, capsys, method):
    out = str(tmp_path / "out")
    config = {
        "lora": '{"r": 4, "target_modules": ["query", "value"]}',
        "ia3": '{"target_modules": ["query"], "feedforward_modules": []}',
    }
    flags = ["--method_config", config[method]] if method in config else []
    where = ["--model", bert(tmp_path / "bert"), "--task", "sst2", "--data_dir", films, "--output_dir", out]
    rate = "2e-3" if method == "full" else "2e-2"
    run = [
        "train",
        *where,
        "--method",
        method,
        *flags,
        "--max_steps",
        "40",
        "--learning_rate",
        rate,
        *QUICK,
    ]
    assert main(run) == 0
    said = capsys.readouterr().out
    accuracy = number(r"sst2: accuracy ([\d.]+)", said)
    assert accuracy > (60 if method in ("head", "ia3") else 95)
    log = read_log(out)
    assert log["scores"]["sst2"]["accuracy"] == pytest.approx(accuracy, abs=0.01) and log["labels"] == [
        "negative",
        "positive",
    ]
    assert log["method"] == method and log["trained_numbers"] > 0 and log["steps"] == 40
    if method == "reft":
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["positions"] == "all"
    # the evaluation's own accuracy, of the same records by Trainer's road, is the same
    assert log["evaluation"]["eval_accuracy"] == pytest.approx(accuracy)

    assert main(["eval", "--adapter", out, "--data_dir", films, "--predictions", str(tmp_path / "p.jsonl")]) == 0
    again = capsys.readouterr().out
    assert number(r"sst2: accuracy ([\d.]+)", again) == accuracy
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and {row["found"] for row in rows} <= {"negative", "positive"}
    assert 100 * sum(row["right"] for row in rows) / 16 == pytest.approx(accuracy)


def test_labels_of_a_file_of_ones_own_and_early_stopping(tmp_path, capsys):
    data = tmp_path / "films.csv"
    data.write_text("\n".join(["review,kind", *(f"{text},{('no', 'yes')[label]}" for text, label in sentences(64))]))
    out = str(tmp_path / "out")
    run = [
        "train",
        "--model",
        bert(tmp_path / "bert"),
        "--train_file",
        str(data),
        "--text_field",
        "review",
        "--label_field",
        "kind",
    ]
    run += [
        "--hold_out",
        "16",
        "--output_dir",
        out,
        "--learning_rate",
        "2e-2",
        "--num_train_epochs",
        "40",
        "--use_cpu",
        "true",
    ]
    run += [
        "--early_stopping",
        "8",
        "--eval_strategy",
        "epoch",
        "--save_strategy",
        "epoch",
        "--load_best_model_at_end",
        "true",
    ]
    run += [
        "--metric_for_best_model",
        "accuracy",
        "--disable_tqdm",
        "true",
        "--report_to",
        "none",
        "--positions",
        "all",
    ]
    assert main(run) == 0
    log = read_log(out)
    assert log["labels"] == ["no", "yes"] and log["train_records"] == 48
    assert log["steps"] < 40 * 6 and log["evaluation"]["eval_accuracy"] == 100


BOOLQ = [
    {
        "instruction": f"Is the {who} {how}? true/false",
        "input": "",
        "output": "",
        "answer": "true" if how == "sad" else "false",
    }
    for who in ("king", "boy", "dog", "cat", "girl", "queen")
    for how in ("sad", "happy")
]


@pytest.fixture
def questions(tmp_path):
    folder = tmp_path / "data" / "boolq"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(BOOLQ[:-2]))
    (folder / "test.json").write_text(json.dumps(BOOLQ[-2:]))
    return str(folder.parent)


def test_questions_with_answers(tmp_path, questions, capsys):
    out = str(tmp_path / "out")
    run = [
        "train",
        "--model",
        "embedded",
        "--task",
        "boolq",
        "--data_dir",
        questions,
        "--output_dir",
        out,
        "--positions",
        "all",
    ]
    assert main([*run, "--max_steps", "60", "--learning_rate", "2e-2", "--dtype", "float32", *QUICK]) == 0
    said = capsys.readouterr().out
    assert number(r"boolq: accuracy ([\d.]+)", said) == 100
    predictions = tmp_path / "p.json"
    assert main(["eval", "--adapter", out, "--base", "--data_dir", questions, "--predictions", str(predictions)]) == 0
    said = capsys.readouterr().out
    assert number(r"out: boolq: accuracy ([\d.]+)", said) == 100
    assert number(r"base: boolq: accuracy ([\d.]+)", said) < 100
    rows = json.loads(predictions.read_text())
    assert [row["generator"] for row in rows] == ["base", "base", out, out]
    assert (
        rows[-1]["output"].strip() == "the correct answer is false"
        and rows[-1]["instruction"] == BOOLQ[-1]["instruction"]
    )
    # several adapters, as of several seeds, and a few records alone
    assert main(["eval", "--adapter", out, out, "--data_dir", questions, "--max_eval_records", "1"]) == 0
    assert "boolq, 2 adapters: accuracy 100.00 ± 0.00" in capsys.readouterr().out


def test_a_task_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(registry, "_SETS", dict(registry._SETS))
    (tmp_path / "mine.py").write_text(
        "from fastreft.tasks.sets import Record, register\n"
        "@register('echo', max_new_tokens=2)\n"
        "def echo(split, folder):\n"
        "    for word in ('king', 'dog') if split == 'train' else ('king',):\n"
        "        yield Record(f'{split} {word}:', ' yes', 'yes')\n"
    )
    out = str(tmp_path / "out")
    mine = ["--task", "echo", "--task_module", str(tmp_path / "mine.py")]
    run = ["train", "--model", "embedded", *mine, "--output_dir", out, "--positions", "all", "--max_steps", "30"]
    assert main([*run, "--learning_rate", "2e-2", *QUICK]) == 0
    assert "echo: accuracy 100.00" in capsys.readouterr().out
    (tmp_path / "mine.py").write_text("import nothing_of_this_name\n")
    fails(main(run), capsys, "the task module", "nothing_of_this_name")


@pytest.mark.parametrize("method", ["reft", "lora", "full"])
def test_a_heads_rate(method, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert(tmp_path / "bert"))
    if method != "full":
        config = {"reft": ReftConfig(task_type="SEQ_CLS", r=2), "lora": LoraConfig(task_type="SEQ_CLS", r=2)}[method]
        model = get_peft_model(model, config)
    training = transformers.TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-2, weight_decay=0.1)
    settings = MethodArguments(method=method, head_lr_scale=10)
    optimizer = optimizer_of(model, settings, training) or transformers.Trainer(model, training).create_optimizer()
    give_head_its_rate(optimizer, model, settings)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, found in rates.items():
        spared = name.endswith(".R") if method == "reft" else "bias" in name or "LayerNorm" in name
        assert found == ((1e-1 if "classifier" in name else 1e-2), 0.0 if spared else 0.1)


def test_a_head_of_many_labels_learns_faster(tmp_path):
    """Where the rate is left to auto, and not where either is given."""
    data = tmp_path / "kinds.jsonl"
    rows = [{"text": text, "kind": f"kind {i % 6}"} for i, (text, _) in enumerate(sentences(12))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["train", "--model", bert(tmp_path / "bert"), "--train_file", str(data), "--text_field", "text"]
    run += ["--label_field", "kind", "--max_steps", "1", *QUICK]
    for i, (flags, said) in enumerate(
        (([], True), (["--head_lr_scale", "1"], False), (["--method", "head"], False), (["--method", "lora"], True))
    ):
        out = str(tmp_path / str(i))
        assert main([*run, "--output_dir", out, *flags]) == 0
        assert any(", the head's 3 times that," in note for note in read_log(out)["notes"]) is said


def t5(folder):
    """A tiny T5 with the embedded model's tokenizer, saved."""
    from fastreft.tasks.models import load_tokenizer

    tokenizer = load_tokenizer("embedded")
    tokenizer.save_pretrained(folder)
    transformers.set_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def test_an_encoder_decoder(tmp_path, questions, capsys):
    out = str(tmp_path / "out")
    run = ["train", "--model", t5(tmp_path / "t5"), "--task", "boolq", "--data_dir", questions, "--output_dir", out]
    assert main([*run, "--max_steps", "2", *QUICK]) == 0
    assert "boolq: accuracy" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    assert main(["eval", "--adapter", out, "--data_dir", questions, "--base"]) == 0
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "Is it cold?", "completion": "true"}))
    assert main(["eval", "--adapter", out, "--eval_file", str(tmp_path / "own.jsonl")]) == 0
    assert number(r"own.jsonl: exact match 0.00   loss ([\d.]+)", capsys.readouterr().out) > 1
    assert main(["generate", "--adapter", out, "--prompt", "Is it cold?", "--max_new_tokens", "3"]) == 0
    assert main(["inspect", "--adapter", out, "--prompt", "Is it cold?"]) == 0
    assert "encoder.block.0" in capsys.readouterr().out
    assert main(["report", "--adapter", out, "--data_dir", questions, "--records", "1", "--max_new_tokens", "3"]) == 0
    assert "without the edits" in (tmp_path / "out" / "report.html").read_text()
    assert "AutoPeftModelForSeq2SeqLM.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


def test_records_that_are_too_long(tmp_path, capsys):
    data = tmp_path / "a.jsonl"
    rows = [{"instruction": "long " * 40, "output": "yes"}, {"instruction": "short", "output": "yes"}]
    data.write_text("\n".join(map(json.dumps, rows)))  # Alpaca's fields, which need no flags
    run = [
        "train",
        "--model",
        "embedded",
        "--train_file",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
        "--max_steps",
        "1",
        *QUICK,
    ]
    run += ["--max_length", "100"]
    fails(main(run), capsys, "the prompt in line 1 of", "--too_long drop")
    assert main([*run, "--too_long", "drop"]) == 0
    assert "1 training records longer than max_length = 100 tokens were left out" in capsys.readouterr().out
    assert main([*run, "--too_long", "cut"]) == 0
    assert "1 training records were cut at max_length = 100 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"task": "boolq"}, ["give either --task or --train_file"]),
        ({"train_file": None, "task": "bolq"}, ["there is no task 'bolq'; did you mean 'boolq'"]),
        ({"train_file": None, "task": "boolq", "data_dir": "./nowhere"}, ["there is no data folder './nowhere'"]),
        ({"method": "lorra"}, ["method is 'lorra'", "did you mean 'lora'"]),
        ({"method": "lora", "method_config": "{"}, ["method_config is not JSON"]),
        ({"method": "lora", "method_config": "[]"}, ["must be a JSON object"]),
        ({"method": "lora", "method_config": '{"rr": 1}'}, ["the method 'lora'", "rr"]),
        ({"method_config": "{}"}, ["method_config is for other methods"]),
        ({"method": "head"}, ["the method 'head' trains a classifier's head"]),
        ({"label_field": "kind"}, ["text_field and label_field go together"]),
        ({"text_field": "prompt", "label_field": "completion"}, ["the training records have 1 label"]),
        ({"text_field": "t", "label_field": "l", "prompt_field": "p"}, ["prompt_field is of records to write"]),
        ({"text_field": "t", "label_field": "l", "chat": "true"}, ["chat is of records to write"]),
        ({"pair_field": "t"}, ["pair_field is a second text"]),
        ({"messages_field": "m", "completion_field": "c"}, ["messages_field and completion_field each"]),
        ({"train_file": None, "task": "boolq", "prompt_field": "p"}, ["prompt_field", "a task has its own"]),
        ({"early_stopping": 2}, ["early_stopping needs --load_best_model_at_end"]),
        ({"early_stopping": -1}, ["early_stopping is -1"]),
        ({"r_lr_scale": 0}, ["r_lr_scale is 0"]),
        ({"head_lr_scale": -1}, ["head_lr_scale is -1"]),
        ({"method": "lora", "head_lr_scale": 3}, ["head_lr_scale is 3.0, and a model that writes has no head"]),
        (
            {"method": "prompt_tuning"},
            ["the method 'prompt_tuning' needs --method_config '{\"num_virtual_tokens\": 20}'"],
        ),
        (
            {"metric_for_best_model": "accuracy"},
            ["metric_for_best_model is 'accuracy'; an evaluation of these", "has loss"],
        ),
        ({"too_long": "shrink"}, ["shrink"]),
        ({"hold_out": 1}, ["hold_out is 1, and there are 1 training records"]),
        ({"hold_out": -1}, ["hold_out is -1"]),
        ({"max_train_records": 0}, ["max_train_records is 0"]),
        ({"chat": "true"}, ["chat template"]),
    ],
)
def test_bad_settings(tmp_path, capsys, change, parts):
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    settings = {"model": "embedded", "train_file": str(data), "output_dir": str(tmp_path / "out")} | change
    fails(
        main(["train", *(f"--{name}={value}" for name, value in settings.items() if value is not None), *QUICK]),
        capsys,
        *parts,
    )
    assert not (tmp_path / "out").exists()


def test_the_best_model_is_not_chosen_by_what_it_is_scored_on(tmp_path, films, capsys):
    run = ["train", "--model", bert(tmp_path / "bert"), "--task", "sst2", "--data_dir", films, *QUICK]
    run += ["--output_dir", str(tmp_path / "out"), "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    fails(main([*run, "--load_best_model_at_end", "true"]), capsys, "the records that it is scored on; give --hold_out")


def test_a_model_that_was_trained_whole_writes(tmp_path, questions, capsys):
    out = str(tmp_path / "out")
    run = ["train", "--model", "embedded", "--task", "boolq", "--data_dir", questions, "--output_dir", out]
    assert main([*run, "--method", "full", "--max_steps", "1", *QUICK]) == 0
    ask = ["generate", "--adapter", out, "--prompt", "The king was", "--max_new_tokens", "4"]
    capsys.readouterr()
    assert main(ask) == 0 and capsys.readouterr().out.strip()
    fails(main([*ask, "--base"]), capsys, "all of the model in", "--base is of an adapter's")
    fails(
        main([*ask, "--strength", "0.5"]),
        capsys,
        "strength is of a ReFT adapter's edits, and the one in",
        "a whole model",
    )


def test_what_a_family_lacks_is_said_before_the_training(tmp_path, questions, capsys):
    run = ["train", "--model", "embedded", "--task", "commonsense", "--data_dir", questions, "--max_eval_records", "2"]
    assert main([*run, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", *QUICK]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "will not be scored" in line]
    assert len(notes) == 7 and notes[0].startswith("note: piqa will not be scored: the data folder")
    assert [*read_log(tmp_path / "out")["scores"]] == ["boolq"]


def test_a_short_training_has_a_curve(tmp_path, questions):
    run = ["train", "--model", "embedded", "--task", "boolq", "--data_dir", questions, "--max_eval_records", "1"]
    assert main([*run, "--output_dir", str(tmp_path / "out"), "--max_steps", "4", *QUICK]) == 0
    assert sum("loss" in row for row in read_log(tmp_path / "out")["history"]) == 4


def test_generate_reads_and_writes_records(tmp_path, questions, capsys):
    out, prompts, written = str(tmp_path / "out"), tmp_path / "p.jsonl", tmp_path / "w.jsonl"
    run = ["train", "--model", "embedded", "--task", "boolq", "--data_dir", questions, "--output_dir", out]
    assert main([*run, "--max_steps", "1", *QUICK]) == 0
    prompts.write_text(json.dumps({"question": "Is it cold?"}))
    ask = ["generate", "--adapter", out, "--prompt_file", str(prompts), "--max_new_tokens", "3", "--base"]
    fails(main(ask), capsys, "has no field 'prompt' among question")
    assert main([*ask, "--prompt_field", "question", "--output", str(written)]) == 0
    (row,) = map(json.loads, written.read_text().splitlines())
    assert row["prompt"] == "Is it cold?" and {*row} == {"prompt", "base", "adapter"}
    fails(main([*ask, "--output", "w.txt"]), capsys, "output is 'w.txt'")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["there is nothing to score"]),
        (["--adapter", "./nowhere"], ["there is no adapter in './nowhere'"]),
        (["--base", "--model", "embedded", "--task", "boolq", "--split", "dev"], ["split is 'dev'"]),
        (["--base", "--model", "embedded", "--task", "banking77", "--data_dir", "."], ["the labels of 'banking77'"]),
        (["--base", "--model", "embedded", "--task", "boolq", "--batch_size", "0"], ["batch_size is 0"]),
        (["--base", "--model", "embedded", "--task", "boolq", "--predictions", "a.txt"], ["predictions is 'a.txt'"]),
    ],
)  # fmt: skip
def test_bad_eval(capsys, flags, parts):
    fails(main(["eval", *flags]), capsys, *parts)
