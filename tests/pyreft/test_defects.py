"""What goes wrong in pyreft 0.1.0, by the numbers of ../shared/reference/pyreft.md, going right here."""

from __future__ import annotations

import peft
import pytest
import torch
from drop_in import arguments, at, model_of
from tiny import LAYERS, VOCAB, WIDTH, batch, logits, make, recorded

import fastreft
from fastreft import pyreft
from fastreft.pyreft import checkpoint, format
from fastreft.pyreft.checkpoint import Entry

WHERE = at([2, 8])


def records(count=8, answer=3):
    """Samples of 7 tokens, the last ``answer`` of them to be learned."""
    torch.manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(1, VOCAB, (7,))
        labels = ids.clone()
        labels[:-answer] = -100
        places = [[0, 6 - answer]] * LAYERS
        made.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
                "intervention_locations": places,
            }
        )
    return made


def trainer_of(folder, model=None, **settings):
    more = {name: settings.pop(name) for name in ("eval_dataset",) if name in settings}
    return pyreft.ReftTrainerForCausalLM(
        model=model or model_of(), args=arguments(folder, **settings), train_dataset=records(), **more
    )


def losses_of(model, steps=20, lr=1e-2, weight_decay=0.0):
    optimizer = torch.optim.AdamW(model.get_trainable_parameters(), lr=lr, weight_decay=weight_decay)
    found = []
    for _ in range(steps):
        loss = model(batch(), unit_locations=WHERE, labels=batch()["input_ids"])[1].loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def rotation_error(model):
    return max(format.orthonormality_error(m) for m in model.interventions.values())


def test_1_training_on_after_a_load_keeps_R_orthonormal(tmp_path):
    model_of().save(tmp_path)
    model = pyreft.ReftModel.load(tmp_path, make("llama"))
    found = losses_of(model)
    assert rotation_error(model) < 2e-6
    assert found[-1] < found[0]


def test_2_weight_decay_reaches_W_and_never_R(tmp_path):
    model = model_of()
    losses_of(model, steps=3, weight_decay=0.5)
    assert rotation_error(model) < 2e-6
    plain, decayed = (trainer_of(tmp_path, weight_decay=decay) for decay in (0.0, 20.0))
    for trainer in (plain, decayed):
        trainer.train()
        assert rotation_error(trainer.model) < 2e-6
    for one, other in zip(plain.model.interventions.values(), decayed.model.interventions.values(), strict=True):
        assert other.W.norm() < 0.9 * one.W.norm()


@pytest.mark.parametrize("kind", ["Loreft", "Noreft", "Nodireft"])
@pytest.mark.parametrize("component", ["block_output", "model.layers[1].mlp.output"])
def test_3_a_load_keeps_the_dtype_and_every_class_and_string_component_loads(kind, component, tmp_path):
    model = model_of([(1, component)], kind=kind, add_bias=True)
    model.save(tmp_path)
    again = pyreft.ReftModel.load(tmp_path, make("llama"))
    assert {p.dtype for p in again.interventions.parameters()} == {torch.float32}
    with torch.no_grad():
        wanted = model(batch(), unit_locations=at([8], 1))[1].logits
        assert torch.equal(again(batch(), unit_locations=at([8], 1))[1].logits, wanted)


def test_4_resume_needs_no_gpu_and_a_checkpoint_is_written_over_an_earlier_one(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    saved = pyreft.ReftModel.load(tmp_path / "checkpoint-6", make("llama"))
    with torch.no_grad():
        next(iter(trainer.model.interventions.values())).W.fill_(0.25)
    trainer.save_model(str(tmp_path / "checkpoint-6"))
    again = pyreft.ReftModel.load(tmp_path / "checkpoint-6", make("llama"))
    assert torch.equal(next(iter(again.interventions.values())).W, torch.full((3, WIDTH), 0.25))
    assert not torch.equal(next(iter(saved.interventions.values())).W, torch.full((3, WIDTH), 0.25))


def test_5_eval_reaches_the_interventions_and_train_returns_the_model():
    model, inputs = model_of(dropout=0.5), batch()
    assert model.train() is model
    with torch.no_grad():
        first, second = (model(inputs, unit_locations=WHERE)[1].logits for _ in range(2))
        assert not torch.equal(first, second)
        assert model.eval() is model
        first, second = (model(inputs, unit_locations=WHERE)[1].logits for _ in range(2))
        assert torch.equal(first, second)


def test_6_evaluation_while_training_and_the_best_model_of_a_causal_lm(tmp_path):
    trainer = trainer_of(
        tmp_path,
        eval_dataset=records(),
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_7_locations_for_all_do_not_stick():
    model, each = model_of(), {"sources->base": (None, [[[8], [7], [6]]] * LAYERS)}
    with torch.no_grad():
        wanted = model(batch(), unit_locations=each)[1].logits
        model(batch(), unit_locations={"base": 8})
        model.generate(batch(), max_new_tokens=2, do_sample=False)
        assert torch.equal(model(batch(), unit_locations=each)[1].logits, wanted)


def test_8_other_peoples_hooks_stay():
    model, seen = model_of(), []
    model.model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        model(batch(), unit_locations=WHERE)
    model.generate(batch(), unit_locations=WHERE, intervene_on_prompt=True, max_new_tokens=1)
    assert len(seen) == 3


@pytest.mark.parametrize("part", ["", ".mlp"])
def test_9_gradient_checkpointing(part, tmp_path):
    found, places = [], [(i, f"model.layers[{i}]{part}.output") for i in range(LAYERS)]
    for checkpointing in (False, True):
        trainer = trainer_of(tmp_path, model_of(places), gradient_checkpointing=checkpointing)
        trainer.train()
        assert trainer.model.model.is_gradient_checkpointing == checkpointing
        found.append([p.detach().clone() for p in trainer.model.interventions.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6)


def test_10_left_padding_and_beams_need_no_arithmetic(tmp_path):
    model_of().save(tmp_path)
    model = pyreft.load(tmp_path, make("llama"), positions="f1+l1").eval()
    inputs = batch("left")
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    together = model.generate(**inputs, **options)
    for ids, mask, wanted in zip(inputs["input_ids"], inputs["attention_mask"], together, strict=True):
        alone = model.generate(input_ids=ids[mask.bool()][None], attention_mask=mask[mask.bool()][None], **options)
        assert torch.equal(alone[0, -4:], wanted[-4:])
    # Where locations are given, beams share their sample's.
    theirs = pyreft.ReftModel.load(tmp_path, make("llama"))
    last = [int(mask.nonzero()[0]) for mask in inputs["attention_mask"]]
    where = {"sources->base": (None, [[[first, 8] for first in last]] * LAYERS)}
    assert torch.equal(theirs.generate(inputs, unit_locations=where, intervene_on_prompt=True, **options)[1], together)


def test_11_a_dispatched_base_keeps_its_own_hooks(tmp_path):
    from accelerate import dispatch_model

    wanted = logits_at(model_of())
    base = make("llama")
    names = [
        *(f"model.layers.{i}" for i in range(LAYERS)),
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    base = dispatch_model(base, {name: "cpu" for name in names}, main_device="cpu", force_hooks=True)
    model = model_of(base=base)
    for _ in range(2):
        assert torch.equal(logits_at(model), wanted)
    assert hasattr(base.model.layers[0], "_hf_hook")
    trainer_of(tmp_path).train()  # on the Transformers that is installed


def logits_at(model):
    with torch.no_grad():
        return model(batch(), unit_locations=WHERE)[1].logits


def test_12_the_hidden_state_is_edited_where_it_lies():
    base, before, after = make("llama"), [], []
    for block in base.model.layers:
        block.register_forward_hook(lambda _m, _a, output: before.append((output.data_ptr(), output)) and None)
    model = model_of(base=base)
    for block in base.model.layers:
        block.register_forward_hook(lambda _m, _a, output: after.append(output.data_ptr()))
    model(batch(), unit_locations=WHERE)
    assert [pointer for pointer, _ in before] == after


def test_13_a_position_listed_twice_counts_once():
    found = []
    for columns in ([2, 8], [2, 8, 2, 2]):
        model = model_of()
        model(batch(), unit_locations=at(columns), labels=batch()["input_ids"])[1].loss.backward()
        found.append([p.grad for p in model.interventions.parameters()])
    for once, twice in zip(*found, strict=True):
        assert torch.equal(once, twice)


def test_14_other_dtypes_torch_compile_and_str():
    model = model_of()
    assert "LoreftIntervention(embed_dim=32, low_rank_dimension=3" in str(model)
    wanted = logits_at(model)
    half = model_of().to(torch.bfloat16)
    assert logits_at(half).dtype == torch.bfloat16
    torch.testing.assert_close(logits_at(half).float(), wanted, rtol=0.2, atol=0.2)
    compiled = model_of()
    compiled.model.forward = torch.compile(compiled.model.forward, backend="eager")
    torch.testing.assert_close(logits_at(compiled), wanted)


def test_an_adapter_of_ours_does_all_of_it_with_plain_trainer_and_peft(tmp_path):
    checkpoint.write(
        tmp_path, [Entry(1, "block_output", fastreft.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2))]
    )
    model = pyreft.load(tmp_path, make("llama"))
    with recorded(model) as seen:
        wanted = logits(model, batch())
    assert len(seen) == LAYERS
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(make("llama"), tmp_path / "ours"), batch()), wanted)
