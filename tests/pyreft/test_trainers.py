"""pyreft's trainers over our edits."""

from __future__ import annotations

import pytest
import torch
from drop_in import arguments, model_of
from tiny import LAYERS, VOCAB, make

import fastreft
from fastreft import pyreft
from fastreft.tasks.models import load_base, load_tokenizer


@pytest.fixture(scope="module")
def chat():
    """The embedded model's tokenizer and a data module of four samples."""
    tokenizer = load_tokenizer("embedded")
    tokenizer.model_max_length = 64
    prompts = [f"The {who} was {how}." for who in ("king", "dog") for how in ("old", "sad")]
    made = pyreft.make_last_position_supervised_data_module(tokenizer, None, prompts, [" So it slept."] * 4, 2)
    return tokenizer, made


def embedded(seed=0):
    base = load_base("embedded")
    torch.manual_seed(seed)
    config = pyreft.ReftConfig(
        [
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": 4,
                "intervention": pyreft.LoreftIntervention(embed_dim=base.config.hidden_size, low_rank_dimension=4),
            }
            for layer in (1, 2)
        ]
    )
    return pyreft.get_reft_model(base, config)


def trainer_of(chat, folder, model=None, **settings):
    tokenizer, module = chat
    return pyreft.ReftTrainerForCausalLM(
        model=model or embedded(), tokenizer=tokenizer, args=arguments(folder, **settings), **module
    )


def test_the_readmes_training_and_generation(chat, tmp_path):
    trainer = trainer_of(chat, tmp_path, max_steps=12)
    assert isinstance(trainer.create_optimizer(), fastreft.ReftAdamW)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    tokenizer, model = chat[0], trainer.model
    prompt = tokenizer("The king was old.", return_tensors="pt")
    _, text = model.generate(
        prompt,
        unit_locations={"sources->base": (None, [[[prompt["input_ids"].shape[-1] - 1]]] * 2)},
        intervene_on_prompt=True,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    assert text.shape[1] <= prompt["input_ids"].shape[1] + 8


def test_resume_ends_where_an_unbroken_run_ends(chat, tmp_path):
    trainer_of(chat, tmp_path / "a", save_strategy="steps", save_steps=3).train()
    whole = pyreft.ReftModel.load(tmp_path / "a" / "checkpoint-6", load_base("embedded"))
    resumed = trainer_of(chat, tmp_path / "a", embedded(seed=9))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for ours, wanted in zip(resumed.model.interventions.values(), whole.interventions.values(), strict=True):
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, wanted.get_parameter(name)), name


def test_evaluation_and_the_best_model(chat, tmp_path):
    trainer = trainer_of(
        (chat[0], {**chat[1], "eval_dataset": chat[1]["train_dataset"]}),
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=5.0,  # so that the first checkpoint is the best
        warmup_steps=0,
        max_steps=4,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("problem", ["single_label_classification", "regression", "multi_label_classification", None])
def test_sequence_classification(problem, tmp_path):
    base = make("bert-cls", num_labels=1 if problem == "regression" else 3)
    base.config.problem_type = problem
    model = model_of(base=base)
    torch.manual_seed(0)
    labels = {"regression": 0.5, "multi_label_classification": [1.0, 0.0, 1.0]}.get(problem, 2)
    records = [
        {
            "input_ids": torch.randint(1, VOCAB, (6,)),
            "attention_mask": torch.ones(6, dtype=torch.long),
            "intervention_locations": [[0, 5]] * LAYERS,
            "labels": labels,
        }
        for _ in range(8)
    ]
    trainer = pyreft.ReftTrainerForSequenceClassification(
        model=model,
        args=arguments(tmp_path, max_steps=8, learning_rate=2e-2, gradient_accumulation_steps=2),
        train_dataset=records,
        eval_dataset=records,
        compute_metrics=lambda prediction: {"mean": float(prediction.predictions.mean())},
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    assert "eval_mean" in after


def test_a_trainer_wants_a_reft_model(tmp_path):
    with pytest.raises(TypeError, match="model is a LlamaForCausalLM; it must be a fastreft"):
        pyreft.ReftTrainerForCausalLM(model=make("llama"), args=arguments(tmp_path))


def test_subspaces_of_another_shape_are_refused(chat, tmp_path):
    trainer = trainer_of(chat, tmp_path)
    inputs = {"input_ids": torch.ones(1, 2, dtype=torch.long), "subspaces": torch.zeros(1)}
    with pytest.raises(ValueError, match="subspaces in a batch has shape"):
        trainer.compute_loss(trainer.model, inputs)
