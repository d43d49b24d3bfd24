"""TRL's trainers take a ReftConfig for their ``peft_config``: the rows edited are those of each sample's own prompt."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fastreft import ReftConfig
from fastreft.interventions import Intervention
from fastreft.tasks.models import load_tokenizer
from fastreft.tasks.places import EMBEDDED_PATH

SETTINGS = dict(max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False)
WAYS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 64},
    "padding-free": {"padding_free": True, "max_length": None},
    "checkpointed": {"gradient_checkpointing": True},
}


def plain():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_PATH, dtype=torch.float32)


def samples(**more):
    kings = [
        {"prompt": "The king said" + " so" * n, "completion": " that he was old" + "." * (n % 3 + 1)} for n in range(12)
    ]
    return Dataset.from_list([sample | more for sample in kings])


def expected(given):
    """f2+l2 of each sequence's prompt, which is what comes before its first label; rows of the batch."""
    rows = []
    width = given["labels"].shape[1]
    for i, labels in enumerate(given["labels"].tolist()):
        mask, places = given.get("attention_mask"), given.get("position_ids")
        starts = [0] if mask is not None or places is None else [s for s in range(width) if places[i, s] == 0]
        for start in starts:
            end = next((s for s in range(start, width) if labels[s] != -100), width)
            n = end - start
            f, last = min(2, n // 2), min(2, n - n // 2)
            rows += [i * width + start + k for k in [*range(f), *range(n - last, n)]]
    return rows


def train(trainer, tmp_path, monkeypatch):
    """Two steps, each batch's rows compared; then the adapter saved and loaded. Gives the edits made without gradients."""
    batches, edits, ungraded = [], [], []
    real = Intervention.edit

    def edit(intervention, hidden, rows, *more):
        (edits if torch.is_grad_enabled() else ungraded).append(sorted(rows[rows >= 0].tolist()))
        return real(intervention, hidden, rows, *more)

    monkeypatch.setattr(Intervention, "edit", edit)
    handle = trainer.model.register_forward_pre_hook(
        lambda _m, _a, given: batches.append(dict(given)), with_kwargs=True
    )
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    handle.remove()
    monkeypatch.undo()
    assert len(batches) >= 2 and edits
    assert {tuple(rows) for rows in edits} == {tuple(expected(given)) for given in batches}
    trained = dict(trainer.model.named_parameters())
    after = [p for p in trained.values() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for R in (p.detach() for name, p in trained.items() if name.endswith(".R")):
        torch.testing.assert_close(R @ R.T, torch.eye(len(R)), rtol=0, atol=1e-6)
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(plain(), tmp_path / "adapter").eval()
    ids = torch.arange(5, 17)[None]
    assert torch.equal(again(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
    return ungraded


def arguments():
    return dict(
        model=plain(),
        processing_class=load_tokenizer("embedded"),
        peft_config=ReftConfig(task_type="CAUSAL_LM", positions="f2+l2"),
    )


@pytest.mark.parametrize("way", list(WAYS))
def test_sft(way, tmp_path, monkeypatch):
    config = trl.SFTConfig(output_dir=str(tmp_path), **SETTINGS, **WAYS[way])
    train(trl.SFTTrainer(args=config, train_dataset=samples(), **arguments()), tmp_path, monkeypatch)


def test_dpo_whose_reference_is_the_model_without_the_edits(tmp_path, monkeypatch):
    data = samples(rejected=" nothing at all.").rename_column("completion", "chosen")
    config = trl.DPOConfig(output_dir=str(tmp_path), **SETTINGS)
    assert not train(trl.DPOTrainer(args=config, train_dataset=data, **arguments()), tmp_path, monkeypatch)


def test_grpo(tmp_path, monkeypatch):
    short = SETTINGS | {"per_device_train_batch_size": 4}
    config = trl.GRPOConfig(output_dir=str(tmp_path), **short, num_generations=4, max_completion_length=6)
    rewards = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
    data = samples().remove_columns("completion")
    trainer = trl.GRPOTrainer(args=config, train_dataset=data, **rewards, **arguments())
    assert train(trainer, tmp_path, monkeypatch)  # what is rewarded was written with the edits
