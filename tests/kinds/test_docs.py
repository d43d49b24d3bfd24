"""The code of docs/methods.md runs: each edit of a user's trains, and is what its file brings back."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import PeftModel

import fastreft
from fastreft.cli import main
from fastreft.kinds import KINDS
from fastreft.ops import names
from fastreft.tasks.models import load_base, load_tokenizer
from fastreft.tasks.modules import _run

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
SPEECH = PAGE.parents[1] / "examples" / "speech.jsonl"


def test_edits_of_ones_own_are_twenty_lines_and_work(tmp_path):
    tokenizer = load_tokenizer("embedded")
    batch = tokenizer(["The king was old. So he slept.", "The dog ran. It was sad."], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :4] = -100
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    known = {}
    for i, block in enumerate(blocks):
        assert len([line for line in block.splitlines() if line.strip()]) <= 20
        known["base"] = load_base("embedded")
        exec(block, known)
        model = known["model"]
        optimizer = fastreft.ReftAdamW(fastreft.param_groups(model, lr=3e-2))
        losses = []
        for _ in range(12):
            loss = model(**batch, labels=labels).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
        model.eval().save_pretrained(tmp_path / str(i))
        loaded = PeftModel.from_pretrained(load_base("embedded"), tmp_path / str(i)).eval()
        assert torch.equal(
            loaded.generate(**batch, max_new_tokens=4, do_sample=False),
            model.generate(**batch, max_new_tokens=4, do_sample=False),
        )


def test_brep_as_a_command(tmp_path, capsys):
    """docs/recipes.md: RED at the first written tokens, on completions that are cut."""
    out = str(tmp_path / "brep")
    train = ["train", "--model", "embedded", "--train_file", str(SPEECH), "--output_dir", out, "--max_steps", "3"]
    brep = ["--intervention_type", "red", "--positions", "d4", "--completion_tokens", "4"]
    assert main([*train, *brep, "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]) == 0
    assert main(["generate", "--adapter", out, "--prompt", "The old king was hungry.", "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out.strip()


OWN = """
import torch, fastreft

@fastreft.register_intervention("inspected")
class Inspected(fastreft.TorchIntervention):
    def build(self, dtype, add_bias):
        self.shift = torch.nn.Parameter(torch.zeros(self.embed_dim))

    def reset_parameters(self):
        torch.nn.init.zeros_(self.shift)

    def formula(self, h):
        return h + self.shift
"""


def test_a_kind_of_ones_own_is_inspected(tmp_path, capsys):
    module, out = tmp_path / "mine.py", str(tmp_path / "adapter")
    module.write_text(OWN)
    own = ["--task_module", str(module)]
    train = ["train", "--model", "embedded", "--train_file", str(SPEECH), "--output_dir", out, "--max_steps", "1"]
    quiet = ["--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]
    assert main([*train, *own, "--intervention_type", "inspected", "--learning_rate", "1e-2", *quiet]) == 0
    assert f"try: fastreft generate --adapter {out} --task_module {module} --prompt TEXT" in capsys.readouterr().out
    names.OWN.pop("inspected")  # as in another process
    KINDS.pop("inspected")
    _run.cache_clear()
    capsys.readouterr()
    assert main(["inspect", "--adapter", out, *own]) == 0
    told = capsys.readouterr().out
    assert "intervention_type inspected" in told and "model.layers.0" in told
