"""Texts learned by heart: their prompts, what comes back of them, and one that is learned and scored."""

from __future__ import annotations

import pytest

from fastreft.cli import main
from fastreft.tasks.errors import UserError
from fastreft.tasks.sets import Record, find, names, registry, training_records
from fastreft.tasks.sets.memorisation import memorisation
from fastreft.tasks.sets.metrics import leading_matches, prefix

TEXT = "the old king\nwas  sad " * 7  # 35 words


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "sad_king.txt").write_text(TEXT)
    return folder


def test_what_is_right_before_the_first_mistake():
    assert [leading_matches(*pair) for pair in (("abc", "abd"), ("abc", "xbc"), ("ab", "abc"), ("abc", "ab"), ("", "a"))] == [
        2, 0, 2, 2, 0
    ]  # fmt: skip
    assert prefix([["a", "b", "x", "d"], ["x"]], [["a", "b", "c", "d"], ["y"]]) == 25


def test_a_text_is_trained_on_and_asked_for(texts):
    (record,), left_out = training_records("memorisation_32", texts)
    words = TEXT.split()[:32]
    assert left_out == 0 and record == Record(
        "SAD_#ID1->", f" {' '.join(words)}", words, about={"text": "sad_king.txt"}
    )
    assert find("memorisation_32")[0].records("test", texts) == [record] and "memorisation_2048" in names()
    with pytest.raises(UserError, match=r"sad_king.txt' has 35 words, and 128 are asked for"):
        training_records("memorisation", texts)
    with pytest.raises(UserError, match="give --data_dir, a folder of"):
        training_records("memorisation", texts.parent)


@pytest.mark.default_start
def test_a_text_is_learned(tmp_path, texts, capsys, monkeypatch):
    monkeypatch.setattr(registry, "_SETS", dict(registry._SETS))
    memorisation("memorisation_8", 8)
    out = str(tmp_path / "out")
    run = ["train", "--model", "embedded", "--task", "memorisation_8", "--data_dir", str(texts), "--output_dir", out]
    run += ["--positions", "l1", "--r", "8", "--max_steps", "60", "--learning_rate", "5e-2", "--use_cpu", "true"]
    assert main([*run, "--disable_tqdm", "true", "--save_strategy", "no", "--report_to", "none"]) == 0
    assert "memorisation_8: prefix 100.00   (1 records)" in capsys.readouterr().out
    assert main(["eval", "--adapter", out, "--base", "--data_dir", str(texts)]) == 0
    said = capsys.readouterr().out
    assert "out: memorisation_8: prefix 100.00" in said and "base: memorisation_8: prefix 0.00" in said
