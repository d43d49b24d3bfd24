"""A LoRA and a ReFT adapter that were saved together are loaded together, or it is said that one is missing."""

import warnings

import pytest
import torch
from damaged import DAMAGES, state_of, unchanged
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tiny import batch, logits, make

from fastreft import ReftConfig, get_reft_model

LORA = dict(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
EDIT = dict(task_type="CAUSAL_LM", r=2, positions="f2+l3", dropout=0.5)


def pair(first="LoRA", name="default"):
    """A model with both, whichever of them it is made with."""
    torch.manual_seed(3)
    made, injected = (LoraConfig(**LORA), ReftConfig(**EDIT))[:: 1 if first == "LoRA" else -1]
    model = get_peft_model(make("llama"), made, adapter_name=name)
    inject_adapter_in_model(injected, model.get_base_model(), "beside")
    for key, p in model.named_parameters():
        if ".reft." in key and key.endswith(".b"):
            p.data.normal_(0, 3)
    return model.eval()


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = call()
    return made, [str(w.message) for w in caught if "was saved together with" in str(w.message)]


@pytest.mark.parametrize("first", ["LoRA", "ReFT"])
@pytest.mark.parametrize("trained_on", [False, True])
def test_both_are_loaded(first, trained_on, tmp_path):
    model = pair(first)
    wanted = logits(model, batch())
    model.save_pretrained(tmp_path)
    again, warned = said(lambda: PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=trained_on))
    assert list(again.peft_config) == ["default", "beside"] and not warned
    assert torch.equal(logits(again.eval() if trained_on else again, batch()), wanted)
    of_adapters = [p.requires_grad for key, p in again.named_parameters() if ".reft." in key or "lora_" in key]
    assert of_adapters == [trained_on] * len(of_adapters)
    again.save_pretrained(tmp_path / "again")
    twice = PeftModel.from_pretrained(make("llama"), tmp_path / "again")
    assert torch.equal(logits(twice, batch()), wanted)


def test_by_the_auto_class(tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    model = pair()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "a")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert torch.equal(logits(again, batch()), logits(model, batch()))


@pytest.mark.parametrize("first", ["LoRA", "ReFT"])
def test_over_a_pair_that_is_there(first, tmp_path):
    model = pair(first, "mine")
    wanted = logits(model, batch())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(".b") or "lora_B" in key:
                p.mul_(2)
    assert not torch.allclose(logits(model, batch()), wanted, atol=0.1)
    model.load_adapter(tmp_path / "mine", "mine")
    torch.testing.assert_close(logits(model, batch()), wanted)


@pytest.mark.parametrize("damage", ["a key less", "NaN", "truncated", "no such layer"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_or_none(damage, tmp_path):
    pair().save_pretrained(tmp_path)
    DAMAGES[damage](tmp_path / "beside")
    base = make("llama")
    before, plain = state_of(base), logits(base, batch())
    with pytest.raises(Exception):  # noqa: B017
        PeftModel.from_pretrained(base, tmp_path)
    unchanged(base, before)
    assert torch.equal(logits(base, batch()), plain)


@pytest.mark.parametrize("how", ["beside it", "under another name", "Transformers"])
def test_what_is_left_is_said(how, tmp_path):
    pair(name="mine" if how == "beside it" else "default").save_pretrained(tmp_path)
    load = {
        "beside it": lambda: PeftModel.from_pretrained(make("llama"), tmp_path / "mine"),
        "under another name": lambda: get_peft_model(make("llama"), LoraConfig(**LORA)).load_adapter(tmp_path, "x"),
        "Transformers": lambda: make("llama").load_adapter(str(tmp_path)),
    }[how]
    (warned,) = said(load)[1]
    assert "was saved together with 'beside', the REFT adapter" in warned and str(tmp_path / "beside") in warned


def test_the_halves_by_hand(tmp_path):
    model = pair(name="mine")
    model.save_pretrained(tmp_path)
    again, _ = said(lambda: PeftModel.from_pretrained(make("llama"), tmp_path / "mine"))
    PeftModel.from_pretrained(again.get_base_model(), tmp_path / "beside", adapter_name="beside")
    assert torch.equal(logits(again, batch()), logits(model, batch()))


def test_adapters_that_are_no_pair_are_none(tmp_path):
    torch.manual_seed(3)
    model = get_reft_model(make("llama"), ReftConfig(**EDIT))
    model.add_adapter("other", ReftConfig(**EDIT))
    model.save_pretrained(tmp_path / "two")
    again, warned = said(lambda: PeftModel.from_pretrained(make("llama"), tmp_path / "two"))
    assert list(again.peft_config) == ["default"] and not warned
    get_peft_model(make("llama"), LoraConfig(**LORA)).save_pretrained(tmp_path / "lora")  # beside it, each with a card
    assert not said(lambda: PeftModel.from_pretrained(make("llama"), tmp_path / "lora"))[1]
