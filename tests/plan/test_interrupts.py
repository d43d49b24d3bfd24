"""A forward that Ctrl-C stops, of which torch tells no hook, leaves nothing behind for the next."""

import pytest
import torch
from tiny import adapter_weights, batch, blocks, columns, hooked, logits, make
from torch import nn

from fastreft import ReftConfig, get_reft_model


def made(**settings):
    torch.manual_seed(2)
    base = make("llama")
    base.enable_input_require_grads()
    model = get_reft_model(base, ReftConfig(r=3, positions="f2+l3", **settings))
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            p.data = 3 * torch.randn_like(p)
    return model


def interrupted(model, call, at=1):
    """Ctrl-C while a block runs for the ``at``-th time."""
    times = []

    def stop(_module, _args):
        times.append(1)
        if len(times) == at:
            raise KeyboardInterrupt

    handle = blocks(model)[1].mlp.register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        handle.remove()


def labelled(inputs, start=3):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :start] = -100
    return labels


STOPPED = [
    {"reft_positions": torch.tensor([[1], [1], [1]])},
    {"labels": torch.ones(3, 9, dtype=torch.long)},
    {"reft_prompt_lengths": torch.tensor([1, 1, 1])},
]


@pytest.mark.parametrize("given", STOPPED)
@pytest.mark.parametrize("through", ["peft", "base"])
def test_the_next_forward_starts_clean(given, through):
    inputs, model = batch("right"), made()
    plain = make("llama")
    called = model if through == "peft" else model.get_base_model()
    interrupted(model, lambda: called(**inputs, **given))
    for length in (9, 5):
        shorter = {name: value[:, :length] for name, value in inputs.items()}
        with hooked(plain, adapter_weights(model), columns(shorter["attention_mask"], 2, 3)):
            wanted = logits(plain, shorter)
        shown = shorter["attention_mask"].bool()
        torch.testing.assert_close(logits(called, shorter)[shown], wanted[shown])


@pytest.mark.parametrize("what", ["a decode step", "a decode step by hand", "a forward"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("forward", ["before", "after"])
def test_a_backward_that_recomputes(what, reentrant, forward):
    inputs = batch("right")

    def run(stopped):
        model = made(component="mlp_output").train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(**inputs, labels=labelled(inputs)).loss
        if stopped:
            model.eval()
            model.gradient_checkpointing_disable()
            if what == "a decode step":
                interrupted(model, lambda: model.generate(**inputs, max_new_tokens=5), at=3)
            elif what == "a forward":
                interrupted(model, lambda: model(input_ids=inputs["input_ids"][:, :4]))
            else:
                cache = model(input_ids=inputs["input_ids"], use_cache=True).past_key_values
                interrupted(model, lambda: model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache))
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if forward == "after":
            loss = model(**inputs, labels=labelled(inputs)).loss
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, found = run(False), run(True)
    assert len(wanted) == 9 and found.keys() == wanted.keys()
    for name, g in found.items():
        torch.testing.assert_close(g, wanted[name])


def test_one_that_somebody_catches_within_a_forward():
    class Again(nn.Module):
        def __init__(self, lm):
            super().__init__()
            self.lm, self.stop = lm, False

        def forward(self, input_ids, attention_mask):
            if self.stop:
                only = torch.tensor([[1], [1], [1]])
                with pytest.raises(KeyboardInterrupt):
                    self.lm(input_ids=input_ids, attention_mask=attention_mask, reft_positions=only)
            return self.lm(input_ids=input_ids, attention_mask=attention_mask).logits

    inputs, inner = batch("right"), make("llama")
    model = get_reft_model(Again(inner), ReftConfig(r=3, positions="f2+l3"))
    with torch.no_grad():
        wanted = model(**inputs)
    inner.model.layers[1].mlp.register_forward_pre_hook(stop_once(model.get_base_model()))
    model.get_base_model().stop = True
    with torch.no_grad():
        assert torch.equal(model(**inputs), wanted)
        assert torch.equal(model(**inputs), wanted)
    here = model.base_model._shared.local.here
    assert here.plan is None and here.outer is None


def stop_once(again):
    times = []

    def stop(_module, _args):
        times.append(1)
        if again.stop and len(times) == 1:
            raise KeyboardInterrupt
        if len(times) == 2:
            times.clear()

    return stop
