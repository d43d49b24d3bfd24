"""Which part of a block is edited, in which layers, and what is said where that does not exist."""

import pytest
import torch
import transformers
import zoo
from tiny import LAYERS, WIDTH, batch, blocks, hooks_on, logits, make
from torch import nn

from fastreft import ReftConfig, get_reft_model, reference
from fastreft.models.blocks import COMPONENTS, component_of, find_blocks


def edited(hidden, layer, rows):
    m = layer.reft_edit["default"]
    return reference.edit_rows(hidden, torch.tensor(rows), m.R, m.W, m.R, m.b)


@pytest.mark.parametrize(
    ("kind", "component", "path"),
    [
        ("llama", "mlp_output", "mlp"),
        ("llama", "attention_output", "self_attn"),
        ("gpt2", "mlp_output", "mlp"),
        ("bert", "mlp_output", "output.dense"),
        ("bert", "attention_output", "attention"),
    ],
)
def test_a_component_of_a_block(kind, component, path):
    inputs, plain = batch("right", (9, 9, 9)), make(kind)
    model = get_reft_model(make(kind), ReftConfig(positions="f1", component=component, layers_to_transform=1))
    part = blocks(model)[1].get_submodule(path)

    def hook(_module, _args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden = edited(hidden, part.reft, [0, 9, 18])
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    blocks(plain)[1].get_submodule(path).register_forward_hook(hook)
    torch.testing.assert_close(logits(model, inputs), logits(plain, inputs))
    assert not torch.equal(logits(model, inputs), logits(make(kind), inputs))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_input_of_a_block(kind):
    inputs, plain = batch("right", (9, 9, 9)), make(kind)
    model = get_reft_model(make(kind), ReftConfig(positions="f1", component="block_input", layers_to_transform=1))
    reft = blocks(model)[1].reft
    blocks(plain)[1].register_forward_pre_hook(lambda _m, args: (edited(args[0], reft, [0, 9, 18]), *args[1:]))
    torch.testing.assert_close(logits(model, inputs), logits(plain, inputs))
    out = model(**inputs, output_hidden_states=True)
    with model.disable_adapter():  # the edit is in a copy: what the block before gave is as it was
        assert torch.equal(out.hidden_states[0], model(**inputs, output_hidden_states=True).hidden_states[0])
    out.logits.sum().backward()
    assert bool(reft.reft_edit["default"].R.grad.any())


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ("all", {0, 1, 2}),
        ("1:", {1, 2}),
        ("::2", {0, 2}),
        ("-1:", {2}),
        ("0:99", {0, 1, 2}),
        (1, {1}),
        ([0, 2], {0, 2}),
    ],
)
def test_layers(layers, wanted):
    model = get_reft_model(make("llama"), ReftConfig(layers_to_transform=layers))
    assert {i for i, block in enumerate(blocks(model)) if hasattr(block, "reft")} == wanted


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"component": "mlp"},
            "component is 'mlp'; it must be one of block_output, block_input, mlp_output, attention_",
        ),
        ({"component": "mlp_output", "target_modules": ["mlp"]}, "component is 'mlp_output' and target_modules"),
        ({"layers_to_transform": "4-12"}, "layers_to_transform is '4-12'; it must be a layer or a list of different"),
        ({"layers_to_transform": "::0"}, "layers_to_transform is '::0'; it must be"),
    ],
)
def test_a_bad_component_or_layer_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ReftConfig(**config)


def test_what_the_model_lacks_is_refused_before_anything_is_attached():
    model = make("llama")
    with pytest.raises(
        ValueError, match=rf"layers_to_transform is '7:9'; .* layers to choose from are 0 to {LAYERS - 1}"
    ):
        get_reft_model(model, ReftConfig(layers_to_transform="7:9"))
    with pytest.raises(ValueError, match=rf"gate_proj is 48 wide; it must have the model's hidden size, {WIDTH}"):
        get_reft_model(model, ReftConfig(target_modules=["gate_proj"]))
    assert not hooks_on(model) and not any("reft" in m._modules for m in model.modules())
    block = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"component is 'mlp_output', but h.0 \(Sequential\) has none .* it has 0: name"
    ):
        component_of("h.0", block, "mlp_output")


def test_a_module_of_another_width_is_refused_at_its_first_forward():
    model = get_reft_model(make("llama"), ReftConfig(target_modules=["act_fn"]))
    with pytest.raises(
        ValueError, match=r"act_fn cannot be edited: its hidden state is \(3, 9, 48\); it must be a tensor"
    ):
        model(**batch())


def test_xlnet_edits_the_content_stream_sequence_first():
    model = zoo.build("xlnet", "causal", "XLNetLMHeadModel")
    given = zoo.inputs(model)
    target = torch.zeros(zoo.BATCH, 1, zoo.LENGTH)
    target[:, :, -1] = 1
    seen, plain = [], []
    hook = model.transformer.layer[0].register_forward_hook(
        lambda _m, _a, out: plain.append([t.clone() for t in out[:2]])
    )
    model(**given, target_mapping=target)
    hook.remove()
    model = get_reft_model(model, ReftConfig(positions="f1"))
    model.get_base_model().transformer.layer[0].register_forward_hook(lambda _m, _a, out: seen.append(out[:2]))
    model(**given, target_mapping=target)
    h, g = seen[0]
    assert h.shape == (zoo.LENGTH, zoo.BATCH, zoo.WIDTH)
    assert (h != plain[0][0]).any(-1).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    assert torch.equal(g, plain[0][1])


def test_vision_text_and_sound():
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    picture = {"pixel_values": torch.randn(2, 3, 16, 16)}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=16, patch_size=8))
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**small, vocab_size=99, eos_token_id=2))
    whisper = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**zoo.shrink(transformers.WhisperConfig) | {"num_mel_bins": 8})
    )
    sound = {"input_features": torch.randn(2, 8, 128), "decoder_input_ids": torch.ones(2, 3).long()}
    for model, given in ((vit, picture), (text, {"input_ids": torch.tensor([[1, 5, 2]])}), (whisper, sound)):
        with torch.no_grad():
            plain = model.eval()(**given)[0]
            edited = get_reft_model(model, ReftConfig(positions="f1+l1")).eval()
            assert not torch.equal(edited(**given)[0], plain)
            with edited.disable_adapter():
                torch.testing.assert_close(edited(**given)[0], plain)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    "model_type", ["bert", "t5", "gpt2", "mistral", "opt", "xlnet", "bloom", "mpt", "deberta", "bart"]
)
def test_the_components_of_many_families_are_found_and_edited(model_type, component):
    model = zoo.build(
        model_type, "sequence", {t: name for t, kind, name in zoo.classes() if kind == "sequence"}[model_type]
    )
    found, given = find_blocks(model), zoo.inputs(model)
    parts = [component_of(name, block, component) for name, block in zip(found.names, found.modules, strict=True)]
    assert len({id(part) for _, part in parts}) == len(found.names)
    with torch.no_grad():
        plain = model(**given).logits
        edited = get_reft_model(model, ReftConfig(positions="all", component=component)).eval()
        assert {name for name, m in model.named_modules() if hasattr(m, "reft")} == {name for name, _ in parts}
        assert not torch.equal(edited(**given).logits, plain)
        with edited.disable_adapter():
            assert torch.equal(edited(**given).logits, plain)


def test_the_mlp_of_opt_gives_rows_without_a_batch():
    model = zoo.build("opt", "causal", "OPTForCausalLM")
    given, block = zoo.inputs(model), find_blocks(model).modules[0]
    given["attention_mask"] = torch.ones(zoo.BATCH, zoo.LENGTH, dtype=torch.long)
    model = get_reft_model(model, ReftConfig(positions="f2+l1", component="mlp_output"))
    before, after = [], []
    block.fc2.register_forward_hook(lambda _m, _args, out: before.append(out.clone()), prepend=True)
    block.fc2.register_forward_hook(lambda _m, _args, out: after.append(out.clone()))
    model(**given).logits.sum().backward()
    assert before[0].shape == (zoo.BATCH * zoo.LENGTH, zoo.WIDTH)
    rows = [b * zoo.LENGTH + s for b in range(zoo.BATCH) for s in (0, 1, zoo.LENGTH - 1)]
    assert (before[0] != after[0]).any(-1).nonzero().flatten().tolist() == rows
    torch.testing.assert_close(after[0], edited(before[0], block.fc2.reft, rows))
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    prompt = {"input_ids": given["input_ids"], "do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    model.add_adapter("first", ReftConfig(positions="f2", component="mlp_output"))
    model.set_adapter("first")
    model.eval()
    cached, whole = (model.generate(**prompt, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("part", ["encoder", "final_char_encoder"])
def test_canine_edits_its_other_encoders_by_name(part):
    """Its deep encoder works on every fourth character: which of its rows to edit has to be said."""
    model = zoo.build("canine", "token", "CanineForTokenClassification")
    given, block = zoo.inputs(model), model.canine.get_submodule(f"{part}.layer.0")
    before, after = [], []
    edited = get_reft_model(model, ReftConfig(target_modules=[f"canine.{part}.layer.0"], positions="f1")).eval()
    block.register_forward_hook(lambda _m, _args, out: before.append(out[0].clone()), prepend=True)
    block.register_forward_hook(lambda _m, _args, out: after.append(out[0].clone()))
    with torch.no_grad():
        if part == "encoder":
            with pytest.raises(ValueError, match="say which tokens to edit with reft_positions"):
                edited(**given)
            before.clear()
        rows = torch.tensor([[1], [0], [1]])
        edited(**given, reft_positions=rows)
    changed = (before[-1] != after[-1]).any(-1)
    assert changed.nonzero().tolist() == [[0, 1], [1, 0], [2, 1]]
