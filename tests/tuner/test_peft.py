"""A ReFT adapter as PEFT's and Trainer's users meet it: saving, loading, switching, training, errors."""

import copy
import json
import pickle

import forked
import peft
import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel
from tiny import LAYERS, VOCAB, WIDTH, batch, blocks, hooks_on, logits, make
from torch import nn

from fastreft import ReftConfig, get_reft_model

KINDS = ["llama", "gpt2", "bert", "bert-cls"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_give_the_same_bits(kind, low_cpu_mem_usage, tmp_path):
    task = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "TOKEN_CLS", "bert-cls": "SEQ_CLS"}[kind]
    config = ReftConfig(task_type=task, r=3, positions="f2+l3", tied=False, act_fn="gelu", layers_to_transform=[0, 2])
    model = peft.get_peft_model(make(kind), config)
    inputs = batch("left")
    wanted = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in tmp_path.iterdir()}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "REFT"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ReftConfig)
    assert loaded.positions == "f2+l3"
    again = PeftModel.from_pretrained(make(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again, inputs), wanted)
    assert not any(p.requires_grad for p in again.parameters())


def test_an_activation_with_parameters_is_saved_under_any_adapter_name(tmp_path):
    model = get_reft_model(make("llama"), ReftConfig(act_fn="prelu", layers_to_transform=0), adapter_name="one")
    with torch.no_grad():
        blocks(model)[0].reft.reft_edit["one"].act.weight.fill_(0.5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama"), tmp_path / "one", adapter_name="two")
    assert torch.equal(logits(again, batch()), logits(model, batch()))


def test_importing_fastreft_is_enough_to_load(tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    base = type(make("llama")).from_pretrained(tmp_path / "base")
    get_reft_model(base, ReftConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    code = (
        "import fastreft, sys; from peft import AutoPeftModelForCausalLM as M;"
        "print(type(M.from_pretrained(sys.argv[1]).base_model).__name__)"
    )
    run = forked.run(code, str(tmp_path / "adapter"))
    assert run.returncode == 0 and run.stdout.split()[-1] == "ReftModel", run.stderr


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_disabled_it_is_the_base_model(kind):
    inputs = batch("left")
    model = get_reft_model(make(kind), ReftConfig())
    wanted = logits(make(kind), inputs)
    edited = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), wanted)
    assert torch.equal(logits(model, inputs), edited)
    assert not torch.equal(edited, wanted)


def test_adapters_are_added_switched_stacked_and_deleted(tmp_path):
    inputs = batch("left")
    model = get_reft_model(make("llama"), ReftConfig(positions="f2", layers_to_transform=[0, 1]), adapter_name="one")
    a = logits(model, inputs)
    model.add_adapter("two", ReftConfig(positions="l3", r=2, layers_to_transform=[1, 2]))
    assert torch.equal(logits(model, inputs), a)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".one." in n for n in trainable)
    model.set_adapter("two")
    b = logits(model, inputs)
    assert not torch.equal(a, b)
    assert all(".two." in n for n, p in model.named_parameters() if p.requires_grad)
    model.base_model.set_adapter(["one", "two"])
    assert not torch.equal(logits(model, inputs), b)
    model.set_adapter("one")
    assert torch.equal(logits(model, inputs), a)
    model.save_pretrained(tmp_path)
    model.delete_adapter("one")
    assert torch.equal(logits(model, inputs), b)
    assert not any(".one." in name for name, _ in model.named_parameters())
    model.load_adapter(tmp_path / "one", "again")
    model.set_adapter("again")
    assert torch.equal(logits(model, inputs), a)


def test_unload_gives_the_base_model_back():
    inputs = batch("left")
    model = get_reft_model(make("llama"), ReftConfig())
    base = model.unload()
    assert torch.equal(logits(base, inputs), logits(make("llama"), inputs))
    assert not any("reft" in name for name, _ in base.named_modules())
    assert not hooks_on(base)
    again = get_reft_model(base, ReftConfig())
    assert not torch.equal(logits(again, inputs), logits(make("llama"), inputs))


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_is_refused(call):
    model = get_reft_model(make("llama"), ReftConfig())
    with pytest.raises(ValueError, match="an edit at positions has no weight form"):
        getattr(model, call)()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_stands_alone(copied):
    inputs = batch("left")
    model = get_reft_model(make("llama"), ReftConfig())
    wanted = logits(model, inputs)
    twin = copied(model)
    with torch.no_grad():
        for block in blocks(model):
            block.reft.reft_edit["default"].b.add_(1)
    assert torch.equal(logits(twin, inputs), wanted)
    assert not torch.equal(logits(model, inputs), wanted)
    twin.unload()
    assert not torch.equal(logits(model, inputs), logits(make("llama"), inputs))


def test_number_of_parameters(capsys):
    model = get_reft_model(make("llama"), ReftConfig(r=4))
    model.print_trainable_parameters()
    assert f"trainable params: {4 * (2 * WIDTH + 1) * LAYERS:,} ||" in capsys.readouterr().out


def test_masters_are_fp32_on_a_bf16_base():
    model = get_reft_model(make("llama").bfloat16(), ReftConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model, batch("left")).dtype == torch.bfloat16


def test_dropout_follows_train_and_eval():
    inputs = batch("left")
    model = get_reft_model(make("llama"), ReftConfig(dropout=0.5)).eval()
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, {"0", "1", "2"}),
        ({"layers_to_transform": 1}, {"1"}),
        ({"exclude_modules": r".*\.1"}, {"0", "2"}),
        ({"target_modules": ["mlp"], "layers_to_transform": [0, 2]}, {"0.mlp", "2.mlp"}),
        ({"target_modules": r".*\.2\.self_attn"}, {"2.self_attn"}),
    ],
)
def test_which_modules_are_edited(config, wanted):
    model = get_reft_model(make("llama"), ReftConfig(**config))
    assert {name.split("layers.")[1] for name in model.base_model.targeted_module_names} == wanted
    assert not torch.equal(logits(model, batch()), logits(make("llama"), batch()))


def test_peft_injection_without_a_peft_model():
    model = peft.inject_adapter_in_model(ReftConfig(), make("llama"))
    assert not torch.equal(logits(model, batch()), logits(make("llama"), batch()))


# ---- Trainer -------------------------------------------------------------------------------------------------------


def trainer(model, folder, **arguments):
    """HF's Trainer, as it comes, on 32 sequences whose answer is one repeated token."""
    torch.manual_seed(3)
    ids = torch.randint(1, VOCAB, (32, 9))
    ids[:, 5:] = 7
    labels = ids.clone()
    labels[:, :5] = -100
    data = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]
    plain = dict(use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, seed=0, save_steps=4, max_steps=8)
    plain |= dict(per_device_train_batch_size=8, learning_rate=2e-2, weight_decay=0.1, lr_scheduler_type="constant")
    arguments = transformers.TrainingArguments(str(folder), **(plain | arguments))
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True}])
def test_trainer_trains_it(arguments, tmp_path):
    model = get_reft_model(make("llama"), ReftConfig(task_type="CAUSAL_LM", positions="f2+l3"))
    run = trainer(model, tmp_path, **arguments)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.7 * before
    for block in blocks(model):
        R = block.reft.reft_edit["default"].R.detach().double()
        torch.testing.assert_close(R @ R.T, torch.eye(4, dtype=R.dtype), rtol=0, atol=1e-5)


def test_trainer_resumes_where_it_was(tmp_path):
    def build():
        torch.manual_seed(5)
        return get_reft_model(make("llama"), ReftConfig(task_type="CAUSAL_LM", positions="f2+l3"))

    whole = build()
    trainer(whole, tmp_path).train()
    resumed = build()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path / "checkpoint-8")
    assert torch.equal(logits(loaded, batch()), logits(whole.eval(), batch()))


def test_trainer_trains_a_classifier_and_its_head(tmp_path):
    model = get_reft_model(make("bert-cls"), ReftConfig(task_type="SEQ_CLS", positions="prompt"))
    data = [{"input_ids": torch.tensor([1, 5 + i % 2, 3]), "labels": torch.tensor(i % 2)} for i in range(16)]
    run = trainer(model, tmp_path, learning_rate=5e-3)
    run.train_dataset = run.eval_dataset = data
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    loaded = PeftModel.from_pretrained(make("bert-cls"), tmp_path / "checkpoint-8")
    assert torch.equal(logits(loaded, batch()), logits(model.eval(), batch()))


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"intervention_type": "lora"}, "intervention_type is 'lora'; it must be one of loreft, noreft"),
        ({"r": 0}, "r is 0; it must be an integer of at least 1"),
        ({"r": 1.5}, "r is 1.5; it must be an integer of at least 1"),
        ({"positions": "f0+l1"}, "positions is 'f0\\+l1'; it must be"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"act_fn": "wave"}, "act_fn 'wave' is neither"),
        ({"layers_to_transform": -1}, "layers_to_transform is -1; it must be a layer or a list of different layers"),
        ({"layers_to_transform": [0, 0]}, r"layers_to_transform is \[0, 0\]; it must be"),
        ({"layers_to_transform": []}, r"layers_to_transform is \[\]; it must be"),
    ],
)
def test_a_bad_configuration_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ReftConfig(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": WIDTH + 1}, f"r is {WIDTH + 1}; it must be at most the model's hidden size, {WIDTH}"),
        ({"layers_to_transform": [0, LAYERS]}, r"layers_to_transform is \[0, 3\]; .* layers to choose from are 0 to 2"),
        (
            {"target_modules": ["nothing"]},
            r"target_modules is \['nothing'\] .* leaves no module of this LlamaForCausalLM",
        ),
        ({"exclude_modules": ".*layers.*"}, r"exclude_modules '\.\*layers\.\*'; that leaves no module"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_attached(config, message):
    model = make("llama")
    with pytest.raises(ValueError, match=message):
        get_reft_model(model, ReftConfig(**config))
    assert not hooks_on(model) and not any("reft" in m._modules for m in model.modules())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"hidden_size": 64},
            r"the adapter does not fit this LlamaForCausalLM: its R has shape \(4, 32\), .* \(4, 64\)",
        ),
        (
            {"num_hidden_layers": 5},
            r"holds weights for 3 blocks \(model.layers.0 to model.layers.2\), the model wants them for 5 blocks",
        ),
        ({"num_hidden_layers": 2}, r"holds weights for 3 blocks .*, the model wants them for 2 blocks"),
    ],
)
def test_an_adapter_of_another_model_is_refused(shape, message, tmp_path):
    get_reft_model(make("llama"), ReftConfig()).save_pretrained(tmp_path)
    other = make("llama", **shape) if "hidden_size" in shape else make_with_layers(shape["num_hidden_layers"])
    wanted = logits(copy.deepcopy(other), batch())
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(logits(other, batch()), wanted)


def make_with_layers(n):
    model = make("llama")
    layers = [copy.deepcopy(model.model.layers[i % LAYERS]) for i in range(n)]
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList(layers), n
    return model


def test_an_adapter_must_not_be_named_as_a_parameter():
    model = get_reft_model(make("llama"), ReftConfig())
    with pytest.raises(ValueError, match="adapter_name is 'b'; it must be none of P, R, W"):
        model.add_adapter("b", ReftConfig())
    assert list(model.peft_config) == ["default"]


def test_a_model_without_blocks_or_width_is_refused():
    with pytest.raises(ValueError, match="no repeated blocks found in Linear"):
        get_reft_model(nn.Linear(2, 2), ReftConfig())
    with pytest.raises(ValueError, match="the hidden size of Sequential is unknown"):
        get_reft_model(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), ReftConfig())


def test_the_last_adapter_is_not_deleted():
    model = get_reft_model(make("llama"), ReftConfig(positions="f2+l3"))
    before = logits(model, batch())
    with pytest.raises(ValueError, match="adapter_name is 'default', the only ReFT adapter there is"):
        model.delete_adapter("default")
    assert torch.equal(logits(model, batch()), before)
