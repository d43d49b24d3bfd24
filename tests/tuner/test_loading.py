"""Loads that fail leave the model as it was, and what is no adapter is refused, going in and out."""

import json
import warnings

import peft
import pytest
import torch
from damaged import DAMAGES, WEIGHTS, adapted, cut, rewritten, state_of, unchanged
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import batch, hooks_on, logits, make
from torch.optim.swa_utils import AveragedModel

from fastreft import ReftConfig, functional, get_reft_model
from fastreft.tuner.loading import layers_of


@pytest.fixture
def folder(tmp_path):
    adapted().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_load_that_fails_leaves_the_base_as_it_was(damage, folder):
    DAMAGES[damage](folder)
    base = make("llama")
    before, plain = state_of(base), logits(base, batch())
    with pytest.raises(Exception) as said:  # whatever the reader of the file says
        PeftModel.from_pretrained(base, folder)
    assert str(said.value).strip()
    unchanged(base, before)
    assert torch.equal(logits(base, batch()), plain)
    assert not (folder / "ran").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("by", ["PEFT", "Transformers"])
def test_a_second_adapter_that_fails_is_not_there(damage, by, folder):
    DAMAGES[damage](folder)
    model = adapted(seed=7) if by == "PEFT" else make("llama")
    base = model.get_base_model() if by == "PEFT" else model
    before, wanted = state_of(base), logits(model, batch())
    with pytest.raises(Exception):  # noqa: B017
        model.load_adapter(folder, "x") if by == "PEFT" else model.load_adapter(str(folder), adapter_name="x")
    unchanged(base, before)
    assert torch.equal(logits(model, batch()), wanted)
    if by == "PEFT":
        assert "x" not in model.peft_config
        adapted(seed=9).save_pretrained(folder)
        model.load_adapter(folder, "x")
        assert set(model.peft_config) == {"default", "x"}


def test_the_next_load_works(folder):
    base, good = make("llama"), {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}
    cut(folder)
    with pytest.raises(Exception):  # noqa: B017
        PeftModel.from_pretrained(base, folder)
    save_file(good, folder / WEIGHTS)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, folder), batch()), logits(adapted(), batch()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_damage(dtype, folder):
    rewritten(lambda tensors: {key: value.to(dtype) for key, value in tensors.items()})(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(make("llama"), folder)


def test_an_average_of_weights_is_retracted_and_said(tmp_path):
    model = adapted()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    for layer in layers_of(model):
        R = layer.reft_edit["default"].R.data
        R.add_(0.1 * torch.randn_like(R))
        functional.retract_([R])
    averaged.update_parameters(model)
    mean = averaged.module
    with pytest.warns(UserWarning, match=r"saving the adapter: 3 rotations R were not orthonormal"):
        mean.save_pretrained(tmp_path)
    for key, value in load_file(tmp_path / WEIGHTS).items():
        if key.endswith("R"):
            torch.testing.assert_close(value @ value.T, torch.eye(3), atol=1e-6, rtol=0)


def test_weights_that_are_not_finite_are_not_saved(folder):
    before = (folder / WEIGHTS).read_bytes()
    model = adapted()
    layers_of(model)[1].reft_edit["default"].W.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"saving the adapter: .*W.* holds values that are not finite"):
        model.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("positions", "f1"), ("act_fn", "gelu"), ("intervention_type", "direft"), ("component", "block_input")],
)
def test_another_edit_does_not_take_an_adapters_place(field, value, folder):
    model = adapted(seed=5, **{field: value})
    before = logits(model, batch())
    with pytest.raises(ValueError, match=f"an adapter with {field} '{value}'"):
        model.load_adapter(folder, "default")
    assert torch.equal(logits(model, batch()), before)


def test_the_same_edit_does(folder):
    model = adapted(seed=5)
    model.load_adapter(folder, "default")
    torch.testing.assert_close(logits(model, batch()), logits(adapted(), batch()))


@pytest.mark.parametrize("name", ["layers", "model", "0", "reft_edit", "reft_suffix", "reft", "R", "", "a.b", 3, None])
def test_names_that_would_lose_tensors_are_refused(name):
    model = adapted()
    before = state_of(model.get_base_model())
    with pytest.raises(ValueError, match="adapter_name is"):
        model.add_adapter(name, ReftConfig(r=2))
    unchanged(model.get_base_model(), before)
    if name is not None:
        with pytest.raises(ValueError, match="adapter_name is"):
            get_reft_model(make("llama"), ReftConfig(r=2), adapter_name=name)


def test_a_later_target_with_the_name_of_an_adapter_is_refused():
    torch.manual_seed(0)
    model = get_reft_model(make("llama"), ReftConfig(r=2), adapter_name="mlp")
    with pytest.raises(ValueError, match="adapter_name is 'mlp', a part of the name"):
        model.add_adapter("x", ReftConfig(r=2, component="mlp_output"))
    assert list(model.peft_config) == ["mlp"]


def test_unload_with_modules_to_save_and_again():
    model = adapted("bert", modules_to_save=["classifier"])
    weight = model.get_base_model().classifier.modules_to_save["default"].weight
    weight.data.add_(1)
    base = model.unload()
    assert hooks_on(base) == 0 and base.classifier.weight is weight
    assert torch.isfinite(logits(get_reft_model(base, ReftConfig(r=2)), batch())).all()


def test_unload_leaves_lora_alone():
    model = adapted()
    base = model.get_base_model()
    torch.manual_seed(4)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(lora, base, "lora")
    unloaded = model.unload()
    plain = make("llama")
    torch.manual_seed(4)
    wanted = peft.inject_adapter_in_model(lora, plain, "lora")
    torch.testing.assert_close(logits(unloaded, batch()), logits(wanted, batch()))


@pytest.mark.parametrize("other", [PrefixTuningConfig, PromptTuningConfig])
def test_prompt_learning_beside_it_is_refused(other):
    prompts = other(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="puts tokens before the prompt"):
        get_peft_model(adapted(), prompts)
    with pytest.raises(ValueError, match="puts tokens before the prompt"):
        peft.inject_adapter_in_model(ReftConfig(r=2), get_peft_model(make("llama"), prompts), "edit")


def test_several_adapters_by_a_list():
    model = adapted()
    model.add_adapter("two", ReftConfig(r=2, positions="l1"))
    model.set_adapter(["default", "two"])
    assert model.base_model.active_adapters == ["default", "two"]
    for odd in ("nobody", "default"):
        with pytest.raises(ValueError, match=rf"adapter_name is \['default', '{odd}'\]; .* default, two, once each"):
            model.set_adapter(["default", odd])
    assert model.base_model.active_adapters == ["default", "two"]


def test_an_adapter_of_the_embedded_model_is_found_without_a_hub(tmp_path):
    from fastreft.tasks.models import load_base

    torch.manual_seed(0)
    model = get_reft_model(load_base("embedded"), ReftConfig(task_type="CAUSAL_LM", r=2))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "embedded"
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(found(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_what_is_wrapped_is_wrapped_once():
    from fastreft.tuner import loading

    before = PeftModel.load_adapter
    loading.wrap()
    assert PeftModel.load_adapter is before and not hasattr(before.__wrapped__, "__wrapped__")


def test_an_interrupted_load(folder, monkeypatch):
    base = make("llama")
    before = state_of(base)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        PeftModel.from_pretrained(base, folder)
    unchanged(base, before)
