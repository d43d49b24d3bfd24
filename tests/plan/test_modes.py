"""Forwards under what watches or replaces torch's operations: selective checkpoints, fake tensors, transforms."""

from functools import partial

import pytest
import torch
from checkpoints import gradients, labelled, made, same
from tiny import batch, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastreft import ReftConfig, get_reft_model

COMPONENTS = pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output"])


@COMPONENTS
@pytest.mark.parametrize("saved", ["fastreft", "mm", "add", ""])
def test_a_selective_checkpoint_round_the_whole(component, saved):
    def policy(_context, op, *_args, **_kwargs):
        return CheckpointPolicy.MUST_SAVE if saved in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    model, inputs = made(component), batch("left")
    labels = labelled(inputs)

    def loss(ids):
        return model(input_ids=ids, attention_mask=inputs["attention_mask"], labels=labels).loss

    contexts = partial(create_selective_checkpoint_contexts, policy)
    wanted = gradients(model, lambda: loss(inputs["input_ids"]))
    found = gradients(model, lambda: checkpoint(loss, inputs["input_ids"], use_reentrant=False, context_fn=contexts))
    same(found, wanted)


@pytest.mark.parametrize("positions", ["f2+l3", "prompt", "all"])
def test_fake_tensors(positions):
    model, inputs = get_reft_model(make("llama"), ReftConfig(positions=positions)), batch()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in inputs.items()}
        assert model(**fake).logits.shape == (3, 9, 61)


@COMPONENTS
@pytest.mark.parametrize("positions", ["f2+l3", "prompt"])
def test_the_gradient_of_each_sample(component, positions):
    inputs = batch("right")
    torch.manual_seed(2)
    base = make("llama", attn_implementation="eager")
    model = get_reft_model(base, ReftConfig(r=3, positions=positions, component=component))
    labels = labelled(inputs)
    labels[:, 3] = inputs["input_ids"][:, 3]
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    others = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def loss(trained, ids, mask, labels):
        given = {"input_ids": ids[None], "attention_mask": mask[None], "labels": labels[None]}
        return functional_call(model, (trained | others, dict(model.named_buffers())), kwargs=given).loss

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0))(trained, *inputs.values(), labels)
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        wanted = gradients(model, lambda one=one, i=i: model(**one, labels=labels[i : i + 1]).loss)
        for name, g in wanted.items():
            torch.testing.assert_close(each[name][i], g, rtol=1e-4, atol=1e-5)
