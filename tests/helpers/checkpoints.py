"""Models whose blocks, or the whole, are recomputed within a backward: how they are made, and their gradients compared."""

import pytest
import torch
from tiny import batch, make

from fastreft import ReftConfig, get_reft_model

REENTRANT = pytest.mark.parametrize("reentrant", [True, False])


def made(component="block_output", kind="llama", shape=None, **settings):
    torch.manual_seed(2)
    base = make(kind, **(shape or {}))
    base.enable_input_require_grads()
    model = get_reft_model(base, ReftConfig(r=3, positions="f2+l3", component=component, **settings))
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            p.data = 3 * torch.randn_like(p)
    return model.train()


def labelled(inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    return labels


def gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, wanted):
    assert len(found) == len(wanted) and all(
        name.replace("_checkpoint_wrapped_module.", "") in wanted for name in found
    )
    for name, g in found.items():
        torch.testing.assert_close(g, wanted[name.replace("_checkpoint_wrapped_module.", "")])


def step(model, side="left"):
    inputs = batch(side) if side == "left" else batch(side, (6, 9, 4))
    return model(**inputs, labels=labelled(inputs), use_cache=False).loss
