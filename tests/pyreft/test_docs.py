"""The code on the migration page runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from drop_in import arguments

import fastreft.pyreft
from fastreft.pyreft import data
from fastreft.tasks.models import load_base, load_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "pyreft.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """What the page takes for granted."""
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer("embedded")
    tokenizer.model_max_length = 64

    def record(prompt, answer):
        ids, labels, _ = data.tokenize_pair(tokenizer, prompt, answer + tokenizer.eos_token)
        return {"input_ids": ids, "labels": labels}

    return {
        "model": load_base("embedded"),
        "tokenizer": tokenizer,
        "prompts": ["The king was old.", "The dog was sad."],
        "answers": [" So he slept.", " It ran."],
        "training_args": arguments(tmp_path / "runs", max_steps=3),
        "record": record,
    }


def test_the_three_pieces_of_code_run(given):
    theirs, ours, files = BLOCKS
    for piece in (theirs, ours):
        assert (
            len([line for line in piece.splitlines() if line.strip() and not line.startswith(("import", "from"))]) < 10
        )
    first = dict(given)
    exec(theirs, first)
    assert first["text"].shape[0] == 1
    assert Path("reft_to_share/config.json").is_file()
    second = {**given, "model": load_base("embedded")}
    exec(ours, second)
    assert second["text"].shape[0] == 2
    assert Path("adapter/adapter_model.safetensors").is_file()
    third = {"base_model": load_base("embedded")}
    exec(files, third)
    assert {name for name in os.listdir("for_pyreft") if name.endswith(".bin")} == {
        name for name in os.listdir("reft_to_share") if name.endswith(".bin")
    }
    ids = given["tokenizer"]("The king was old.", return_tensors="pt")["input_ids"]
    where = {"sources->base": (None, [[[ids.shape[1] - 1]]])}
    first["reft_model"].eval()
    with torch.no_grad():
        wanted = first["reft_model"]({"input_ids": ids}, unit_locations=where)[1].logits
        assert torch.equal(third["model"](input_ids=ids).logits, wanted)


def test_every_name_in_the_table_is_served_or_refused_with_advice():
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \| (.+?) \|$", TEXT.split("## Their names")[1].split("\n## ")[0], flags=re.MULTILINE
    )
    names = {name for row in rows for name in re.findall(r"`((?:Reft|make_|get_|parse_|Loreft)\w+)`", row[0])}
    assert len(names) > 15
    for name in names:
        if name in fastreft.pyreft._ELSEWHERE:
            with pytest.raises(AttributeError, match=r"TRL|intervention_type"):
                getattr(fastreft.pyreft, name)
        else:
            assert getattr(fastreft.pyreft, name)


def test_every_public_name_has_a_row():
    plain = {"load", "save", "CheckpointError", "ReftTrainer", "ReftDataset", "TaskType"}
    others = {name for name in fastreft.pyreft.__all__ if name.endswith("Intervention")}
    text = TEXT.replace("...Distributed", "ReftTrainerForCausalLMDistributed")
    missing = {name for name in set(fastreft.pyreft.__all__) - plain - others if name not in text}
    assert not missing
