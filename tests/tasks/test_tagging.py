"""Words tagged: which token has a word's tag, and a tagger trained, scored, saved and scored again from the command line."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from shell import fails
from tiny import save_bert

from fastreft.cli import main
from fastreft.tasks.data import IGNORED, encode_labelled
from fastreft.tasks.models import load_tokenizer
from fastreft.tasks.run_log import read_log
from fastreft.tasks.sets import tagged

pytestmark = pytest.mark.default_start
WORDS = "the king had 7 12 and sold them to york , ##s 305".split()
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", "--report_to", "none"]


@pytest.fixture
def bert(tmp_path):
    return save_bert(tmp_path / "bert", WORDS)


@pytest.fixture
def numbers(tmp_path):
    """A folder in CoNLL's layout, in which each number is a place."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, n, start in (("train", 48, 0), ("test", 13, 5)):
        lines = []
        for i in range(start, start + n):
            words = [WORDS[(i * k + k) % 11] for k in range(1, 4 + i % 4)]
            tags = ["B-LOC" if word.isdigit() else "O" for word in words]
            lines += [f"{word} X {tag}" for word, tag in zip(words, tags, strict=True)] + [""]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return str(folder)


def labels_of(tokenizer, words, **limits):
    record = tagged(words, [f"T{i}" for i in range(len(words))])
    limits = {"max_length": 64, "too_long": "error"} | limits
    row = encode_labelled([record], tokenizer, "tag", record.answer, **limits).data[0]
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    return [(token, label) for token, label in zip(tokens, row["labels"], strict=True) if label != IGNORED], tokens


def test_the_first_token_of_a_word_has_its_tag(bert):
    tokenizer = load_tokenizer(bert, writes=False)
    kept, tokens = labels_of(tokenizer, ["the", "kings", "\u200b", "york,"])
    assert tokens == ["[CLS]", "the", "king", "##s", "york", ",", "[SEP]"]
    assert kept == [("the", 0), ("king", 1), ("york", 3)]  # a word of no tokens has none
    kept, tokens = labels_of(tokenizer, ["the", "kings", "york"], max_length=4)
    assert tokens == ["[CLS]", "the", "king", "[SEP]"] and kept == [("the", 0), ("king", 1)]


def test_words_keep_their_blanks_with_a_byte_level_tokenizer():
    tokenizer = load_tokenizer("embedded")
    words = ["The", "king", "said", "so."]
    kept, tokens = labels_of(tokenizer, words)
    assert tokens == tokenizer.convert_ids_to_tokens(tokenizer("The king said so.").input_ids)
    assert [label for _, label in kept] == [0, 1, 2, 3]
    assert [token.lstrip("Ġ")[0] for token, _ in kept] == [word[0] for word in words]


def value(pattern, text):
    return [float(part) for part in re.search(pattern, text).groups()]


@pytest.mark.parametrize("method", ["reft", "lora", "head"])
def test_a_tagger_learns_and_is_scored_again(tmp_path, bert, numbers, capsys, method):
    out = str(tmp_path / "out")
    config = ["--method_config", '{"r": 4, "target_modules": ["query", "value"]}'] if method == "lora" else []
    run = ["train", "--model", bert, "--task", "conll2003", "--data_dir", numbers, "--output_dir", out, *QUICK, *config]
    run += ["--method", method, "--positions", "all", "--max_steps", "120", "--learning_rate", "3e-2"]
    assert main([*run, "--per_device_eval_batch_size", "4"]) == 0
    said = capsys.readouterr().out
    pattern = r"conll2003: entity_f1 ([\d.]+)   token_accuracy ([\d.]+)"
    scores = value(pattern, said)
    assert scores[0] > (60 if method == "head" else 95) and scores[1] > 80
    log = read_log(out)
    assert log["kind"] == "tag" and log["labels"][:3] == ["O", "B-PER", "I-PER"]
    # Trainer's own evaluation, of the same records by another road and in other batches, is the same
    found = [log["evaluation"][f"eval_{name}"] for name in ("entity_f1", "token_accuracy")]
    assert found == pytest.approx([log["scores"]["conll2003"][name] for name in ("entity_f1", "token_accuracy")])
    if method == "reft":
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    again = ["eval", "--adapter", out, "--data_dir", numbers, "--predictions", str(tmp_path / "p.jsonl")]
    assert main([*again, "--batch_size", "3"]) == 0
    assert value(pattern, capsys.readouterr().out) == scores
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == 13 and all(len(row["words"]) == len(row["found"]) == len(row["answer"]) for row in rows)
    assert all(row["right"] is (row["found"] == row["answer"]) for row in rows)
    if method == "reft":
        pytest.importorskip("matplotlib")
        capsys.readouterr()
        fails(main(["generate", "--adapter", out, "--prompt", "one"]), capsys, "was trained to tag; 'fastreft eval'")
        assert main(["report", "--adapter", out]) == 0
        assert "7 (B-LOC)" in (tmp_path / "out" / "report.html").read_text()


def test_lists_of_ones_own(tmp_path, bert, capsys):
    data, out = tmp_path / "a.jsonl", str(tmp_path / "out")
    rows = [{"tokens": ["the", who, "7"], "ner_tags": ["O", "O", "NUM"]} for who in ("king", "york")] * 12
    data.write_text("\n".join(map(json.dumps, rows)))
    run = ["train", "--model", bert, "--train_file", str(data), "--text_field", "tokens", "--label_field", "ner_tags"]
    run += [
        "--hold_out",
        "4",
        "--output_dir",
        out,
        "--positions",
        "f2+l2",
        "--max_steps",
        "30",
        "--learning_rate",
        "2e-2",
    ]
    assert main([*run, *QUICK]) == 0
    log = read_log(out)
    assert log["labels"] == ["NUM", "O"] and log["evaluation"]["eval_entity_f1"] == 100
    assert "eval entity_f1 100.0000" in capsys.readouterr().out


def test_labels_of_words_are_no_answer_of_a_causal_models():
    """A causal model's head for words: its labels do not tell where a prompt ends, in training as when it is scored."""
    import fastreft

    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    base = transformers.AutoModelForTokenClassification.from_config(config)
    model = fastreft.get_reft_model(base, fastreft.ReftConfig(task_type="TOKEN_CLS", positions="f1+l2", r=2))
    ids = torch.arange(1, 13).view(2, 6)
    labels = torch.tensor([[IGNORED, 1, IGNORED, 2, 0, IGNORED]] * 2)
    model(input_ids=ids, labels=labels).loss.backward()
    trained = [edit.columns for edit in model.reft_report().edits]
    model(input_ids=ids)
    assert trained == [edit.columns for edit in model.reft_report().edits] == [[[0, 4, 5]] * 2] * 2


def test_what_cannot_be_tagged(tmp_path, bert, numbers, capsys):
    run = [
        "train",
        "--model",
        bert,
        "--task",
        "conll2003",
        "--data_dir",
        numbers,
        "--output_dir",
        str(tmp_path / "out"),
    ]
    (tmp_path / "data" / "test.txt").write_text("york X B-CITY\n")
    fails(main([*run, *QUICK]), capsys, "the label 'B-CITY' of a record to evaluate is none of the 9 labels")
    (tmp_path / "data" / "test.txt").write_text("york X B-LOC\n")
    (tmp_path / "bert" / "tokenizer.json").unlink()
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertJapaneseTokenizer"}))
    fails(main([*run, *QUICK]), capsys, "tagging words needs a fast tokenizer")
    assert not (tmp_path / "out").exists()
