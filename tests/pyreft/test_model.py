"""pyreft's ReftModel over our edits."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from drop_in import R, at, model_of
from tiny import LAYERS, WIDTH, batch, hooks_on, logits, make
from torch import nn

from fastreft import pyreft, reference
from fastreft.pyreft import format

# ---- places --------------------------------------------------------------------------------------------------------


PLACES = {
    "block_output": ("model.layers.1", "output"),
    "block_input": ("model.layers.1", "input"),
    "mlp_output": ("model.layers.1.mlp", "output"),
    "attention_output": ("model.layers.1.self_attn", "output"),
    "mlp_input": ("model.layers.1.mlp", "input"),
    "attention_input": ("model.layers.1.self_attn", "input"),
    "model.layers[1].mlp.output": ("model.layers.1.mlp", "output"),
    "model.layers[1].self_attn.o_proj.output": ("model.layers.1.self_attn.o_proj", "output"),
    "model.layers[1].input": ("model.layers.1", "input"),
    "model.norm.input": ("model.norm", "input"),
}


@pytest.mark.parametrize("component", PLACES)
def test_every_place_is_edited_where_it_says(component):
    model, inputs = model_of([(1, component)]), batch("left")
    (intervention,) = model.interventions.values()
    name, side = PLACES[component]
    base = make("llama")

    def edited(hidden):
        rows = torch.tensor([column + i * hidden.shape[1] for i in range(3) for column in (8,)])
        p = intervention
        return reference.edit_rows(hidden, rows, p.R, p.W, p.R, p.b)

    def after(_module, _args, output):
        return edited(output) if isinstance(output, torch.Tensor) else (edited(output[0]), *output[1:])

    def before(_module, args, kwargs):
        if args:
            return (edited(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edited(kwargs["hidden_states"])}

    if side == "output":
        base.get_submodule(name).register_forward_hook(after)
    else:
        base.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        found = model(inputs, unit_locations=at([8], 1))[1].logits
    wanted = logits(base, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, logits(make("llama"), inputs), atol=1e-3)


@pytest.mark.parametrize(
    ("layer", "component", "message"),
    [
        (7, "block_output", "layer is 7; LlamaForCausalLM has layers 0 to 2"),
        (0, "head_output", "component is 'head_output'; it must be block, mlp or attention"),
        (0, "model.layers[9].output", "LlamaForCausalLM has no such module"),
        (0, "model.layers[0].mlp", "does not end in .output or .input"),
    ],
)
def test_a_place_that_is_not_there(layer, component, message):
    base = make("llama")
    with pytest.raises(ValueError, match=message):
        model_of([(layer, component)], base)
    assert not hooks_on(base)


def test_gpt2_and_bert_have_the_same_places():
    for kind in ("gpt2", "bert-cls"):
        for component in ("block_output", "attention_output", "mlp_output"):
            model = model_of([(1, component)], make(kind))
            with torch.no_grad():
                changed = model(batch("right"), unit_locations=at([0, 2], 1))[1].logits
            assert not torch.allclose(changed, logits(make(kind), batch("right")))


# ---- calls ---------------------------------------------------------------------------------------------------------


def test_every_token_without_locations_and_both_outputs():
    model, inputs = model_of(), batch("left")
    base, output = model(inputs, output_original_output=True)
    with torch.no_grad():
        assert torch.equal(base.logits, logits(make("llama"), inputs))
        everywhere = model(inputs, unit_locations=at(list(range(9))))[1].logits
    torch.testing.assert_close(output.logits, everywhere, rtol=1e-4, atol=1e-5)


def test_each_intervention_has_its_own_locations():
    model, inputs = model_of(), batch("left")
    where = {"sources->base": (None, [[[8], [7], [6]], [[0, 1], [5, 5], [2, 2]], [[3], [3], [3]]])}
    with torch.no_grad():
        found = model(inputs, unit_locations=where)[1].logits
        base = make("llama")
        for i, intervention in enumerate(model.interventions.values()):
            rows = torch.tensor([c + s * 9 for s, row in enumerate(where["sources->base"][1][i]) for c in row])

            def hook(_module, _args, output, p=intervention, rows=rows):
                return reference.edit_rows(output, rows, p.R, p.W, p.R, p.b)

            base.model.layers[i].register_forward_hook(hook)
        torch.testing.assert_close(found, logits(base, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("component", ["block_output", "block_input"])
@pytest.mark.parametrize(("on_prompt", "truths"), [(True, [True, False, False]), (False, [False, True, True])])
def test_the_hooks_count_as_none_in_forwards_that_edit_nothing(component, on_prompt, truths):
    """As the PEFT tuner's do: steps after an edited prompt, a prompt before edited steps, and the bare model's forward."""
    model, inputs = model_of([(1, component)]), batch("left")
    block, seen = model.model.model.layers[1], []
    kept = block._forward_pre_hooks if component == "block_input" else block._forward_hooks
    block.self_attn.register_forward_pre_hook(lambda *_: seen.append((bool(kept), len(kept))))
    column = 8 if on_prompt else 0
    model.generate(
        inputs, unit_locations=at([column], 1), intervene_on_prompt=on_prompt, max_new_tokens=3, min_new_tokens=3
    )
    assert seen == [(truth, 1) for truth in truths]
    seen.clear()
    logits(model.model, inputs)
    assert seen == [(False, 1)]


def test_what_is_not_supported_says_so():
    model, inputs = model_of(), batch("left")
    with pytest.raises(NotImplementedError, match="sources are not supported"):
        model(inputs, sources=[inputs], unit_locations=at([1]))
    with pytest.raises(ValueError, match="for 3 interventions"):
        model(inputs, unit_locations=at([1], 2))
    with pytest.raises(
        AttributeError, match=r"fastreft\.pyreft has no ReftRewardDataset: train with TRL's RewardTrainer"
    ):
        pyreft.ReftRewardDataset  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        pyreft.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "representations is empty"),
        ([3], TypeError, "a representation is a int; it must be a dict"),
        ({"layr": 1}, ValueError, "unknown field 'layr'"),
        ({"moe_key": "a"}, ValueError, "moe_key is not supported"),
        ({"unit": "h.pos"}, ValueError, "unit is 'h.pos'; it must be 'pos'"),
        (
            {"intervention": nn.Linear(2, 2)},
            TypeError,
            "intervention is a torch.nn.modules.linear.Linear; it must be one",
        ),
        ({"intervention_type": nn.Linear}, TypeError, "intervention_type is .*Linear"),
    ],
)
def test_a_configuration_that_is_not_one(given, error, message):
    with pytest.raises(error, match=message):
        pyreft.ReftConfig(representations=given)


def test_an_intervention_may_be_given_by_its_class_or_a_list():
    representation = {"layer": 1, "low_rank_dimension": 2, "intervention_type": pyreft.NoreftIntervention}
    model = pyreft.get_reft_model(make("llama"), pyreft.ReftConfig(representations=representation))
    (intervention,) = model.interventions.values()
    assert (intervention.embed_dim, intervention.r) == (WIDTH, 2)
    listed = pyreft.ReftConfig([[2, "block_output", "pos", 1, 2, pyreft.LoreftIntervention]])
    assert listed.built(make("llama"))[0].layer == 2
    with pytest.raises(ValueError, match=r"representations\[0\] has no intervention"):
        pyreft.get_reft_model(make("llama"), pyreft.ReftConfig({"layer": 1}))
    with pytest.raises(ValueError, match="mode must be 'parallel'"):
        pyreft.ReftConfig(representation, mode="serial")


def test_parameters_are_counted_and_printed_as_pyreft_does(capsys):
    model = model_of()
    assert model.count_parameters() == LAYERS * (2 * R * WIDTH + R)
    assert len(model.get_trainable_parameters()) == 3 * LAYERS
    model.print_trainable_parameters()
    out = capsys.readouterr().out
    assert f"trainable intervention params: {LAYERS * (2 * R * WIDTH + R):,d} || trainable model params: 0\n" in out
    assert "|| trainable%: " in out
    model.enable_model_gradients()
    assert model.count_parameters(include_model=True) == model.count_parameters() + sum(
        p.numel() for p in model.model.parameters()
    )


def test_beside_lora():
    lora = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    wanted = logits(lora, batch("left"))
    model = model_of([(1, "base_model.model.model.layers[1].output")], lora)
    assert sum(p.requires_grad for p in model.model.parameters()) == 0
    model.model.base_model.enable_adapter_layers()
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad = "lora" in name
    _, output = model(batch("left"), unit_locations=at([8], 1), labels=batch("left")["input_ids"])
    assert not torch.allclose(output.logits, wanted)
    output.loss.backward()
    assert all(p.grad is not None for p in model.get_trainable_parameters())


def test_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **k: calls.append(("create", name)))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "upload_folder", lambda self, **k: calls.append(("upload", k["folder_path"]))
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, local_dir: str(tmp_path / "saved"))
    model = model_of()
    model.save(tmp_path / "saved", save_to_hf_hub=True, hf_repo_name="me/mine")
    assert calls == [("create", "me/mine"), ("upload", str(tmp_path / "saved"))]
    again = pyreft.ReftModel.load("me/mine", make("llama"))
    with torch.no_grad():
        wanted = model(batch(), unit_locations=at([8]))[1].logits
        assert torch.equal(again(batch(), unit_locations=at([8]))[1].logits, wanted)


def test_the_base_models_own_weights_travel_with_include_model(tmp_path):
    model = model_of(base=make("bert-cls"))
    model.model.classifier.requires_grad_(True)
    with torch.no_grad():
        model.model.classifier.weight.fill_(0.5)
    model.save(tmp_path, include_model=True)
    assert format.read_tensors(tmp_path / "pytorch_model.bin").keys() == {"classifier.weight", "classifier.bias"}
    again = pyreft.ReftModel.load(tmp_path, make("bert-cls"), include_model=True)
    assert torch.equal(again.model.classifier.weight, model.model.classifier.weight)
    without = pyreft.ReftModel.load(tmp_path, make("bert-cls"))
    assert not torch.equal(without.model.classifier.weight, model.model.classifier.weight)
    torch.save({"classifier.weight": torch.ones(7)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds classifier.weight \(7,\), which BertForSequenceClassification"):
        pyreft.ReftModel.load(tmp_path, make("bert-cls"), include_model=True)


def test_saved_settings_are_json(tmp_path):
    model_of([(0, "block_output"), (1, "model.layers[1].mlp.output")]).save(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["sorted_keys"] == [
        "layer_0_comp_block_output_unit_pos_nunit_1#0",
        "comp_model_layers[1]_mlp_output_unit_pos_nunit_1#0",
    ]
