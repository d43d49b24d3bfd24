"""The code of docs/causal.md runs, on the model that ships in place of the page's wider one."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fastreft.causal import Das, Subspace, collect
from fastreft.tasks.models import load_base, load_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "causal.md"


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer, model = load_tokenizer("embedded"), load_base("embedded")
    words = ("king", "girl", "bird", "one", "two", "is", "are")
    ids = {word: tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words}

    def to_inputs(setting):
        numbers = torch.tensor([ids["one"], ids["two"]])[torch.as_tensor(setting["number"])]
        return {"input_ids": torch.stack([torch.tensor([ids[noun] for noun in setting["noun"]]), numbers], 1)}

    sentences = {
        name: {"input_ids": torch.tensor([[ids[word] for word in words]])}
        for name, words in {"base": ("king", "is", "one"), "source": ("girl", "are", "two")}.items()
    }
    known = {"model": model, "to_inputs": to_inputs, "id_of_is": ids["is"], "id_of_are": ids["are"], "collect": collect}
    known |= {**sentences, "R2": torch.eye(2, 192), "kept2": sentences["source"], "d": 192}
    known |= {name: sentences["source"] for name in ("one", "two")}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks = [block.replace("576", "192").replace("model, 8, R", "model, 3, R") for block in blocks]
    blocks = [re.sub(r"\{8: ", "{3: ", block).replace("[8]", "[3]").replace("(4, ", "(2, ") for block in blocks]
    exec(blocks[0], known)
    assert isinstance(known["das"], Das)
    assert known["das"].iia(known["test"]) > 0.9  # what a token says of itself is easily found
    exec(blocks[1].replace("    ...", "    model(**base)"), known)
    assert known["kept"].values.shape == (1, 1, 192)
    assert isinstance(known["R"], Subspace)
