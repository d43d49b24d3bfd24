"""The code of docs/concepts.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastreft.tasks.models import load_base, load_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "concepts.md"


def test_the_page(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="there is no gguf here")
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer("embedded")

    def ids(texts):
        return [tokenizer(text).input_ids for text in texts]

    seas = ["The ship was on the sea, and the waves were high.", "The captain looked at the sea and the sails."]
    fields = ["The farmer was in the field, and the corn was high.", "The farmer looked at the horses and the carts."]
    known = {
        "model": load_base("embedded"),
        "base": load_base("embedded"),
        "with_it": ids(seas),
        "without": ids(fields),
        "prompts": ids(["The man said that", "In the morning"]),
        "answers_with_it": ids([" the sea was high.", " they took the ship."]),
        "answers_without": ids([" the corn was high.", " they took the cart."]),
        "batch": tokenizer("The man said that", return_tensors="pt"),
    }
    known["labels"] = [[-100] * 4 + text[4:] for text in known["with_it"]]
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, known)
    assert Path("concept.gguf").is_file()
    assert len(known["latents"]) == 2
