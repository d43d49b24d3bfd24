"""A load over an adapter that is there: refused, it leaves that one as it was, active and whole."""

import pytest
import torch
from damaged import DAMAGES, WEIGHTS, adapted, rewritten, state_of, unchanged
from peft import LoraConfig, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import batch, logits, make

from fastreft import ReftConfig


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path)
    return tmp_path


def lora_and_reft(seed):
    torch.manual_seed(seed)
    outer = get_peft_model(make("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    inject_adapter_in_model(ReftConfig(r=2, positions="f2+l3"), outer.get_base_model(), "edit")
    return outer


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_is_not_loaded_over_stays_active(damage, folder):
    DAMAGES[damage](folder)
    model = adapted(seed=7)
    before, wanted = state_of(model.get_base_model()), logits(model, batch())
    with pytest.raises(Exception):  # noqa: B017
        model.load_adapter(folder, "default")
    unchanged(model.get_base_model(), before)
    assert model.active_adapters == ["default"] and torch.equal(logits(model, batch()), wanted)
    assert not torch.equal(wanted, logits(make("llama"), batch()))


@pytest.mark.parametrize("damage", ["a key less", "another shape", "NaN"])
def test_nor_by_a_state_dict(damage, folder):
    DAMAGES[damage](folder)
    model = adapted(seed=7)
    before, wanted = state_of(model.get_base_model()), logits(model, batch())
    with pytest.raises(ValueError, match="adapter"):
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    unchanged(model.get_base_model(), before)
    assert torch.equal(logits(model, batch()), wanted)


def test_a_head_of_another_shape_leaves_no_half(tmp_path):
    adapted("bert", modules_to_save=["classifier"]).save_pretrained(tmp_path)
    rewritten(lambda t: {k: v[:1].contiguous() if "classifier" in k else v for k, v in t.items()})(tmp_path)
    model = adapted("bert", seed=7, modules_to_save=["classifier"])
    before = state_of(model.get_base_model())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path, "default")
    unchanged(model.get_base_model(), before)


@pytest.mark.parametrize("damage", ["a key less", "NaN", "truncated"])
def test_of_lora_and_reft_both_or_none(damage, tmp_path):
    lora_and_reft(3).save_pretrained(tmp_path)
    DAMAGES[damage](tmp_path / "edit")
    model = lora_and_reft(4)
    before, wanted = state_of(model.get_base_model()), logits(model, batch())
    with pytest.raises(Exception):  # noqa: B017
        model.load_adapter(tmp_path, "default")
    unchanged(model.get_base_model(), before)
    assert torch.equal(logits(model, batch()), wanted)
