"""suggest_lr: what its rate does to a model, and that the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from tiny import batch, make

import fastreft
from fastreft import ReftConfig, get_reft_model, suggest_lr
from fastreft.tuner import rate

pytestmark = pytest.mark.default_start


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-cls"])
@pytest.mark.parametrize("start", ["identity", "random"])
def test_a_step_at_the_rate_moves_the_state_by_what_was_asked(kind, start):
    config = ReftConfig(r=2, positions="all", init_weights=start)
    for move in (0.05, 0.1):
        model = get_reft_model(make(kind), config)
        seen = []
        real = rate._moved

        def spy(*args, real=real, seen=seen):
            seen.append((args[-1], real(*args)))
            return seen[-1][1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rate, "_moved", spy)
            found = suggest_lr(model, move=move)
        assert any(abs(moved - move) < 0.1 * move and abs(tried - found) < 0.2 * found for tried, moved in seen)


def test_the_model_is_left_as_it_was():
    base = make("llama").train()
    before, random = state_of(base), torch.get_rng_state()
    found = suggest_lr(base, ReftConfig(r=2))
    assert found > 0 and suggest_lr(base, ReftConfig(r=2)) == pytest.approx(found, rel=0.5)
    after = state_of(base)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert base.training and not any(hasattr(module, "reft") for module in base.modules())
    assert all(p.requires_grad for p in base.parameters())
    model = get_reft_model(base, ReftConfig(r=2))
    before, random = state_of(model), torch.get_rng_state()
    assert suggest_lr(model) == suggest_lr(model)  # the same bits for the same adapter
    after = state_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())


def test_deeper_and_wider_edits_and_more_positions_want_less():
    def of(positions="f2+l3", r=2, **shape):
        torch.manual_seed(0)
        return suggest_lr(make("llama", **shape), ReftConfig(r=r, positions=positions, init_weights="identity"))

    assert of(num_hidden_layers=8) < of(num_hidden_layers=2)
    assert of(positions="all") < of(positions="l1")
    assert of(r=8) < of(r=1)


def test_where_R_is_trained_a_step_is_no_longer_than_its_rows():
    """A b that alone moves the state too little would have a rate at which R is another one after each step."""
    config = ReftConfig(r=1, positions="l1", intervention_type="consreft")
    assert suggest_lr(make("llama"), config, move=1e3) == pytest.approx(32**-0.5, rel=0.05)
    assert suggest_lr(make("llama"), ReftConfig(positions="l1", intervention_type="bias"), move=1e3) > 1


def test_inputs_of_ones_own_an_encoder_decoder_and_other_methods():
    from peft import LoraConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    assert suggest_lr(make("llama"), ReftConfig(r=2), batch("right")) > 0
    shape = dict(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    t5 = T5ForConditionalGeneration(T5Config(**shape, pad_token_id=0, decoder_start_token_id=0))
    assert suggest_lr(t5, ReftConfig(r=2)) > 0
    assert suggest_lr(get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"]))) > 0


def test_what_has_no_rate():
    base = make("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        suggest_lr(base)
    base.lm_head.requires_grad_(True)  # which moves no hidden state
    with pytest.raises(ValueError, match="a step changes no hidden state"):
        suggest_lr(base)
    assert "suggest_lr" in fastreft.__all__


@pytest.mark.parametrize(("kind", "move"), [("llama", rate.MOVE), ("bert-cls", rate.MOVE_EDITED)])
def test_three_times_as_much_is_for_all_that_a_model_reads_and_not_for_what_it_writes(kind, move):
    model = get_reft_model(make(kind), ReftConfig(r=2, positions="all", init_weights="identity"))
    assert suggest_lr(model) == suggest_lr(model, move=move)
