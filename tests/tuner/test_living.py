"""ReFT beside what else people do to a model: LoRA, offloading, quantisation, hooks of their own, autocast, copies."""

import copy
import pickle
from tempfile import TemporaryDirectory

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from tiny import batch, blocks, logits, make
from torch import nn

from fastreft import ReftConfig, get_reft_model


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model(where, tmp_path):
    inputs = batch("left")
    plain, base = make("llama"), make("llama")
    torch.manual_seed(7)
    wanted = logits(get_reft_model(plain, ReftConfig()), inputs)
    if where == "cpu":
        cpu_offload(base, execution_device=torch.device("cpu"))
    else:
        disk_offload(base, tmp_path, execution_device=torch.device("cpu"))
    assert any(hasattr(m, "_hf_hook") for m in base.modules())
    torch.manual_seed(7)
    model = get_reft_model(base, ReftConfig())
    assert torch.equal(logits(model, inputs), wanted)
    assert any(hasattr(m, "_hf_hook") for m in base.modules())


def test_a_quantised_base():
    inputs = batch("left")
    base = torch.ao.quantization.quantize_dynamic(make("bert"), {nn.Linear}, dtype=torch.qint8)
    plain = logits(base, inputs)
    model = get_reft_model(base, ReftConfig())
    assert not torch.equal(logits(model, inputs), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), plain)


def test_hooks_of_others_stay_and_see_the_edit():
    inputs, seen = batch("left"), []
    base = make("llama")
    base.model.layers[0].register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
    logits(base, inputs)
    model = get_reft_model(base, ReftConfig(positions="all"))
    logits(model, inputs)
    model.unload()
    logits(base, inputs)
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_hooks_added_afterwards_see_the_edit_and_go_without_it():
    inputs, seen = batch("left"), []
    base = make("llama")
    plain = logits(base, inputs)
    model = get_reft_model(base, ReftConfig(positions="all"))
    wanted = logits(model, inputs)
    first, second = (
        base.model.layers[0].register_forward_hook(lambda _m, _a, output: seen.append(output.clone())) for _ in range(2)
    )
    assert torch.equal(logits(model, inputs), wanted)
    first.remove()
    assert torch.equal(logits(model, inputs), wanted)
    model.unload()
    assert torch.equal(logits(base, inputs), plain)
    second.remove()
    assert torch.equal(logits(base, inputs), plain)
    edited, also, still, bare = seen
    assert torch.equal(edited, also) and torch.equal(edited, still) and not torch.equal(edited, bare)


def test_autocast():
    inputs = batch("left")
    model = get_reft_model(make("llama"), ReftConfig())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs).logits
    torch.testing.assert_close(out.float(), logits(model, inputs), rtol=0.1, atol=0.1)
    out.float().square().sum().backward()
    assert bool(blocks(model)[0].reft.reft_edit["default"].R.grad.isfinite().all())


def test_a_configuration_survives_a_pickle_and_a_copy():
    config = ReftConfig(component="mlp_output", layers_to_transform="1:")
    assert pickle.loads(pickle.dumps(config)).to_dict() == copy.deepcopy(config).to_dict() == config.to_dict()


def used(base, **loading):
    """Attach, train a step, generate, save and load on a base: each as it should be, the loaded one to the bit."""
    inputs, greedy = batch("left"), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    plain = logits(base, inputs)
    model = get_reft_model(base, ReftConfig(task_type="CAUSAL_LM", positions="f2+l3"))
    wanted = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), plain)
    assert not torch.equal(wanted, plain)
    labels = inputs["input_ids"].clone()
    labels[:, :7] = -100
    model(**inputs, labels=labels).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    written = model.generate(**inputs, **greedy)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(model.unload(), folder, **loading)
    assert torch.equal(logits(again, inputs), wanted)
    assert torch.equal(again.generate(**inputs, **greedy), written)


@pytest.mark.parametrize("where", ["cpu", "auto"])
def test_a_device_map(where, tmp_path):
    make("llama").save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where)
    used(base, device_map=where, max_memory={"cpu": "1GiB"})


def test_a_torchao_base():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base = make("llama")
    torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
    used(base)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_bitsandbytes_base(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    make("llama").save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    load = transformers.AutoModelForCausalLM.from_pretrained
    used(load(tmp_path, device_map="cpu", quantization_config=config))
