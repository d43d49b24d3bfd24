"""Names of adapters that are a part of other adapters' tensors' names, by which PEFT would save those without them."""

import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from tiny import batch, logits, make

from fastreft import ReftConfig, get_reft_model

OWN = {"positions": "f2+l3", "tied": "position"}
CLASHES = [
    (OWN, "3"),
    (OWN, "4"),
    ({"act_fn": "xielu"}, "beta"),
    ({"act_fn": "xielu"}, "alpha_p"),
    ({"act_fn": "xielu"}, "eps"),
    ({"component": "mlp_output"}, "mlp"),
    ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ({"modules_to_save": ["lm_head"]}, "original_module"),
]


def model_of(name="default", **settings):
    torch.manual_seed(0)
    return get_reft_model(make("llama"), ReftConfig(**({"r": 2} | settings)), adapter_name=name)


@pytest.mark.parametrize(("settings", "name"), CLASHES)
def test_a_name_is_refused_whichever_comes_first(settings, name):
    first = model_of(**settings)
    whole = get_peft_model_state_dict(first)
    with pytest.raises(ValueError, match=f"adapter_name is '{name}', a part of the name"):
        first.add_adapter(name, ReftConfig(r=2))
    assert list(first.peft_config) == ["default"] and get_peft_model_state_dict(first).keys() == whole.keys()
    if name != "original_module":  # which is only there once a module is wrapped
        second = model_of(name)
        with pytest.raises(ValueError, match=f"adapter_name is '{name}', a part of the name"):
            second.add_adapter("default", ReftConfig(**({"r": 2} | settings)))
        assert list(second.peft_config) == [name]


@pytest.mark.parametrize(("settings", "name"), CLASHES)
def test_of_an_injected_lora_too(settings, name):
    first = model_of(**settings)
    if "modules_to_save" in settings:
        return  # the adapter's file has whole modules by another rule
    lora = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=f"adapter_name is '{name}', a part of the name"):
        peft.inject_adapter_in_model(lora, first.get_base_model(), name)
    assert not any("lora_" in key for key, _ in first.named_parameters()) and list(first.peft_config) == ["default"]


def test_a_reft_that_has_the_name_of_a_lora_part():
    outer = peft.get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter_name is 'lora_A', a part of the name"):
        peft.inject_adapter_in_model(ReftConfig(r=2), outer.get_base_model(), "lora_A")


def test_what_came_past_the_checks_is_not_saved_in_part(tmp_path):
    model = model_of(**OWN)
    model.peft_config["3"] = LoraConfig()
    with pytest.raises(ValueError, match="adapter_name is '3', a part of the names of the tensors of 'default'"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("adapter_model*"))


@pytest.mark.parametrize("names", [("a", "a_b"), ("5", "edit"), ("(", "[x]"), ("é", "layer")])
@pytest.mark.parametrize("settings", [OWN, {"act_fn": "xielu", "positions": "f2+l3"}])
def test_other_names_keep_every_tensor(names, settings, tmp_path):
    model = model_of(names[0], **settings)
    model.add_adapter(names[1], ReftConfig(r=2, **settings))
    for key, p in model.named_parameters():
        if ".reft." in key and p.dim() == 1:
            p.data.normal_(0, 3)
    model.save_pretrained(tmp_path)
    for name in names:
        model.set_adapter(name)
        again = PeftModel.from_pretrained(make("llama"), tmp_path / name)
        assert torch.equal(logits(again, batch()), logits(model, batch()))


def test_trls_name_for_its_reference_is_saved_and_loaded_without_a_word(tmp_path):
    model = model_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("ref", ReftConfig(r=2))
    model.set_adapter("ref")
    wanted = logits(model, batch())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama"), tmp_path / "ref", adapter_name="other")
    assert torch.equal(logits(again, batch()), wanted)
