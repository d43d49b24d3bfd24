"""ReFT and LoRA in one model: what PEFT's tuner of the one does with the other's adapter."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tiny import batch, hooks_on, logits, make

from fastreft import ReftConfig, get_reft_model

LORA = dict(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
EDIT = dict(r=2, positions="f2+l3")


def shaken(model):
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if ".reft." in name and name.endswith(".b"):
            p.data.normal_(0, 3)
    return model


def lora(seed=3):
    torch.manual_seed(seed)
    return get_peft_model(make("llama"), LoraConfig(**LORA)).eval()


def both(**edit):
    """A LoRA model with a ReFT adapter in it, and the same LoRA alone."""
    outer = lora()
    torch.manual_seed(4)
    inject_adapter_in_model(ReftConfig(**(EDIT | edit)), outer.get_base_model(), "edit")
    return shaken(outer).eval()


def reft_first():
    torch.manual_seed(4)
    outer = shaken(get_reft_model(make("llama"), ReftConfig(**EDIT)))
    torch.manual_seed(3)
    inject_adapter_in_model(LoraConfig(**LORA), outer.get_base_model(), "lora")
    return outer.eval()


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("edit", [{}, {"component": "mlp_output"}, {"target_modules": ["q_proj"]}])
def test_lora_is_merged_and_unmerged_round_the_edit(edit):
    model = both(**edit)
    before, wanted = state(model), logits(model, batch())
    model.merge_adapter()
    assert all(m.merged for m in model.modules() if hasattr(m, "lora_A"))
    torch.testing.assert_close(logits(model, batch()), wanted, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key])
    torch.testing.assert_close(logits(model, batch()), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wanted, logits(lora(), batch()), atol=0.1)


def test_an_edit_that_is_asked_to_be_merged_is_refused_before_lora_is():
    model = both()
    before = state(model)
    with pytest.raises(ValueError, match=r"adapter_names is .*'edit'.* has no weight form"):
        model.merge_adapter(["default", "edit"])
    assert same(model, before)
    first = reft_first()
    before = state(first)
    for call in (first.merge_adapter, first.unmerge_adapter, first.merge_and_unload):
        with pytest.raises(ValueError, match="has no weight form"):
            call()
    assert same(first, before)


def test_an_edit_within_what_is_merged_is_refused():
    torch.manual_seed(4)
    base = inject_adapter_in_model(ReftConfig(**EDIT, target_modules=["q_proj"]), make("llama"), "edit")
    model = get_peft_model(base, LoraConfig(**LORA))
    before = state(model)
    with pytest.raises(ValueError, match=r"the edit of .*q_proj acts on that module's output before the Lora adapter"):
        model.merge_adapter()
    assert same(model, before)


@pytest.mark.parametrize("call", ["merge_and_unload", "unload"])
def test_lora_does_not_go_without_the_edit(call, tmp_path):
    model = both()
    before, wanted = state(model), logits(model, batch())
    with pytest.raises(ValueError, match=r"holds the ReFT adapter 'edit', .* delete_adapter\('edit'\)"):
        getattr(model, call)()
    assert same(model, before) and list(model.peft_config) == ["default", "edit"]
    model.save_pretrained(tmp_path)  # and as the sentence says
    model.delete_adapter("edit")
    base = getattr(model, call)()
    assert hooks_on(base) == 0 and not any("lora_" in key or ".reft." in key for key in base.state_dict())
    if call == "merge_and_unload":
        again = PeftModel.from_pretrained(base, tmp_path / "edit")
        torch.testing.assert_close(logits(again, batch()), wanted, atol=1e-4, rtol=1e-4)


def test_a_deleted_edit_is_gone():
    model, alone = both(), lora()
    model.delete_adapter("edit")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert torch.equal(logits(model, batch()), logits(alone, batch()))
    assert hooks_on(model) == hooks_on(alone) and not any(".reft" in name for name, _ in model.named_modules())
    inject_adapter_in_model(ReftConfig(**EDIT), model.get_base_model(), "edit")  # and can come again
    assert not torch.equal(logits(shaken(model), batch()), logits(alone, batch()))


def test_of_two_edits_one_is_deleted():
    model = both()
    one = logits(model, batch())
    inject_adapter_in_model(ReftConfig(r=2, positions="l1"), model.get_base_model(), "more")
    model.delete_adapter("more")
    for module in model.modules():
        if hasattr(module, "specs"):
            module.set_adapter(["edit"])
    assert torch.equal(logits(model, batch()), one) and list(model.peft_config) == ["default", "edit"]


def test_a_trained_head_goes_with_the_edit():
    model = both(modules_to_save=["lm_head"])
    model.get_base_model().lm_head.modules_to_save["edit"].weight.data.add_(1)
    model.delete_adapter("edit")
    assert torch.equal(logits(model, batch()), logits(lora(), batch()))


def test_a_deleted_lora_is_gone_and_the_edit_stays():
    model = reft_first()
    torch.manual_seed(4)
    alone = shaken(get_reft_model(make("llama"), ReftConfig(**EDIT))).eval()
    assert not torch.equal(logits(model, batch()), logits(alone, batch()))
    model.delete_adapter("lora")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert torch.equal(logits(model, batch()), logits(alone, batch()))


def test_the_last_edit_of_its_own_model_is_unloaded_and_the_injected_lora_stays():
    model = reft_first()
    before = state(model)
    with pytest.raises(ValueError, match=r"'default', the only ReFT adapter there is, .* unload\(\) gives"):
        model.delete_adapter("default")
    assert same(model, before) and list(model.peft_config) == ["default", "lora"]
    base, plain = model.unload(), make("llama")
    torch.manual_seed(3)
    wanted = inject_adapter_in_model(LoraConfig(**LORA), plain, "lora")
    assert list(base.peft_config) == ["lora"]
    assert torch.equal(logits(base, batch()), logits(wanted, batch()))


def test_a_mixed_model_of_others_goes_through_as_it_came():
    torch.manual_seed(3)
    model = get_peft_model(make("llama"), LoraConfig(**LORA), mixed=True).eval()
    model.add_adapter("more", LoHaConfig(r=2, target_modules=["k_proj"], init_weights=False))
    model.set_adapter(["default", "more"])
    wanted = logits(model, batch())
    model.base_model.merge_adapter()
    model.base_model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch()), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wanted, logits(lora(), batch()))


@pytest.mark.parametrize("how", ["inject", "PEFT", "Transformers"])
def test_lora_does_not_take_the_name_of_an_edit(how):
    torch.manual_seed(4)
    base = inject_adapter_in_model(ReftConfig(**EDIT), make("llama"))
    before, wanted = state(base), logits(base, batch())
    add = {
        "inject": lambda config: inject_adapter_in_model(config, base),
        "PEFT": lambda config: get_peft_model(base, config),
        "Transformers": base.add_adapter,
    }[how]
    with pytest.raises(ValueError, match="adapter_name is 'default', as the model's ReFT adapter is named"):
        add(LoraConfig(**LORA))
    assert same(base, before) and torch.equal(logits(base, batch()), wanted)
    assert base.peft_config["default"].peft_type == "REFT"
