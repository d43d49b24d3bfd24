"""The experiment for PEFT's own comparison of methods (examples/peft_method_comparison): its files, its count, and steps of
the kind that PEFT's script takes, whose labels begin at the first token.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftConfig, get_peft_model
from tiny import batch, make

from fastreft import ReftConfig

HERE = Path(__file__).resolve().parents[2] / "examples" / "peft_method_comparison"
EXPERIMENT = HERE / "loreft" / "llama-3.2-3B-rank8-tied"
LLAMA = dict(
    hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
    head_dim=128, vocab_size=128256, tie_word_embeddings=True,
)  # fmt: skip


def test_the_number_that_is_trained_is_the_one_that_is_told():
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LLAMA))
    model = get_peft_model(base, PeftConfig.from_pretrained(EXPERIMENT))
    trained, total = model.get_nb_trainable_parameters()
    assert trained == 28 * (2 * 8 * 3072 + 8) and total - trained == 3_212_749_824
    assert f"| {trained:,} |" in (HERE / "README.md").read_text()


def test_a_step_of_their_kind():
    config = PeftConfig.from_pretrained(EXPERIMENT)
    assert isinstance(config, ReftConfig)
    model = get_peft_model(make("llama"), config)
    given = json.loads((EXPERIMENT / "training_params.json").read_text())
    optimizer = torch.optim.AdamW(model.parameters(), **given.pop("optimizer_kwargs"))
    assert not given  # all else is their default
    inputs = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs, labels=labels, num_items_in_batch=int(inputs["attention_mask"].sum())).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    held = dict(model.named_parameters())
    assert all(not torch.equal(held[name], p) for name, p in before.items())
    Rs = [held[name] for name in before if name.endswith(".R")]
    assert len(Rs) == 3 and all((R @ R.T - torch.eye(8)).abs().max() < 1e-5 for R in Rs)
    edits = model.reft_report().edits
    assert len(edits) == 3 and all(
        {*range(n)} <= {*row} for e in edits for row, n in zip(e.columns, (7, 4, 9), strict=True)
    )


def test_prompt_positions_have_nothing_to_edit_there():
    model = get_peft_model(make("llama"), ReftConfig(r=8, positions="f5+l5", task_type="CAUSAL_LM"))
    inputs = batch("right")
    with pytest.raises(ValueError, match="use positions='all'"):
        model.train()(**inputs, labels=inputs["input_ids"])
