"""Training ReFT beside what else people train with: LoRA, gradient checkpointing, torch.compile."""

import peft
import pytest
import torch
import transformers
from common import assert_as_good
from tiny import VOCAB, batch, logits, make
from torch._dynamo.backends.debugging import aot_eager

import fastreft
from fastreft import ReftAdamW, ReftConfig, get_reft_model, param_groups

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}


def answers(inputs):
    """Labels of the last two columns."""
    labels = inputs["input_ids"].clone()
    labels[:, :7] = -100
    return labels


def gradients(model):
    """Name -> gradient of all that trains; none is missing."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found and all(g is not None and bool(g.any()) for g in found.values())
    return found


def lora_and_reft():
    """A LoRA model with a ReFT adapter in it, which has a name of its own; both train."""
    outer = peft.get_peft_model(make("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0))
    peft.inject_adapter_in_model(ReftConfig(task_type="CAUSAL_LM", positions="f2+l3"), outer.get_base_model(), "edit")
    for name, parameter in outer.named_parameters():
        parameter.requires_grad_(".reft." in name or "lora_" in name)
    return outer


def test_lora_and_reft_train_generate_save_and_load(tmp_path):
    inputs, outer = batch("left"), lora_and_reft()
    optimizer = ReftAdamW(param_groups(outer, lr=1e-2))
    before = {name: p.detach().clone() for name, p in outer.named_parameters()}
    outer.train()
    for _ in range(2):  # LoRA's A has no gradient before its B has moved
        optimizer.zero_grad()
        outer(**inputs, labels=answers(inputs)).loss.backward()
        optimizer.step()
    gradients(outer)
    for name, parameter in outer.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
    outer.eval()
    wanted, written = logits(outer, inputs), outer.generate(**inputs, **GREEDY)
    outer.save_pretrained(tmp_path)
    with outer.disable_adapter():
        assert torch.equal(logits(outer, inputs), logits(make("llama"), inputs))
    assert torch.equal(logits(outer, inputs), wanted)
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path)
    peft.PeftModel.from_pretrained(again.get_base_model(), tmp_path / "edit", adapter_name="edit")
    assert torch.equal(logits(again, inputs), wanted)
    assert torch.equal(again.generate(**inputs, **GREEDY), written)


def test_the_reft_saved_with_a_lora_is_loaded_with_it(tmp_path):
    """As Trainer does at its end for the best of several checkpoints."""
    inputs, outer = batch("left"), lora_and_reft()
    for p in outer.parameters():
        p.data.add_(0.02 * p.requires_grad)
    fastreft.retract_model_(outer)
    best = logits(outer, inputs)
    outer.save_pretrained(tmp_path)
    for p in outer.parameters():
        p.data.add_(0.5 * p.requires_grad)
    assert not torch.equal(logits(outer, inputs), best)
    outer.load_adapter(tmp_path, outer.active_adapter)
    assert torch.equal(logits(outer, inputs), best)


def test_the_name_of_a_lora_adapter_is_refused():
    outer = peft.get_peft_model(make("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="adapter_name is 'default', as the model's LORA adapter is named"):
        peft.inject_adapter_in_model(ReftConfig(), outer.get_base_model())
    assert not any(".reft." in name for name, _ in outer.named_parameters())
    assert outer.peft_config["default"].peft_type == "LORA"
    merged = outer.merge_and_unload()
    get_reft_model(merged, ReftConfig())  # LoRA is gone, and its name free


def t5():
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    config = transformers.T5Config(initializer_factor=0.5, decoder_start_token_id=0, pad_token_id=0, **shape)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_are_those_without(kind, use_reentrant):
    inputs = batch("left")

    def step(dtype, checkpointed):
        torch.manual_seed(7)
        base = t5() if kind == "t5" else make(kind)
        task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
        model = get_reft_model(base, ReftConfig(task_type=task, positions="f2+l3")).to(dtype).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loss = model(**inputs, labels=answers(inputs)).loss
        loss.backward()
        return [loss.detach(), *gradients(model).values()]

    plain, got = step(torch.float32, False), step(torch.float32, True)
    if kind == "t5":  # which rounds otherwise under checkpoints, bare as well
        assert_as_good(got, plain, step(torch.float64, False))
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # GPT-2's loss breaks the graph of the outer model
@pytest.mark.parametrize("side", ["left", None])
def test_a_compiled_model_trains_and_is_compiled_once(side, kind):
    inputs = batch(side or "left", *(() if side else ((9, 9, 9),)))
    graphs = []

    def step(dtype, compiled):
        torch.manual_seed(7)
        model = get_reft_model(make(kind), ReftConfig(task_type="CAUSAL_LM", positions="f2+l3")).to(dtype).train()
        call = torch.compile(model, backend=counted) if compiled else model
        found = []
        for ids in (inputs["input_ids"], inputs["input_ids"].flip(1) * inputs["attention_mask"]):
            given = inputs | {"input_ids": ids, "labels": answers(inputs)}
            out = call(**given)
            out.loss.backward()
            found += [out.logits.detach(), *gradients(model).values()]
            found = [t.clone() for t in found]
            model.zero_grad()
            graphs.append(None)  # a batch is over
        return found

    def counted(graph, given):
        graphs.append(graph)
        return aot_eager(graph, given)

    torch._dynamo.reset()
    got = step(torch.float32, True)
    assert graphs[0] is not None
    assert graphs[-2:] == [None, None]  # nothing was compiled between the ends of the two batches
    assert_as_good(got, step(torch.float32, False), step(torch.float64, False))
