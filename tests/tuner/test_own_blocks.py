"""Blocks of somebody's own, whose output is not always a tensor of theirs: what others hold of it stays as it is."""

import pytest
import torch
from tiny import adapter_weights, batch, blocks, columns, hooked, make
from torch import nn
from torch.nn import functional as F

from fastreft import ReftConfig, get_reft_model, reference

ENDS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": lambda t: t.clamp(max=1).exp(),
    "viewed relu": lambda t: torch.relu(t).view(t.shape),
    "softmax": lambda t: t.softmax(-1),
    "layer norm": lambda t: F.layer_norm(t, (32,)),
    "expanded": lambda t: t[:1].expand_as(t),
    "part of more": lambda t: torch.cat([t, t], -1).chunk(2, -1)[0],
}


class Block(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.linear, self.end = nn.Linear(32, 32), end

    def forward(self, h):
        if self.end == "nothing":
            return h
        return h.view(h.shape) if self.end == "a view" else ENDS[self.end](self.linear(h))


class Net(nn.Module):
    class config:
        hidden_size, model_type = 32, "x"

    def __init__(self, end):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(end) for _ in range(3))

    def forward(self, states, by_name=False):
        h = states
        for block in self.blocks:
            h = block(h=h) if by_name else block(h)
        return h + states


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("end", ["nothing", "a view", *ENDS])
def test_what_blocks_return(end, by_name):
    torch.manual_seed(2)
    model = get_reft_model(Net(end), ReftConfig(positions="f2+l3", r=3)).train()
    edits = [block.reft.reft_edit["default"] for block in model.get_base_model().blocks]
    states = torch.randn(2, 9, 32)
    kept = states.clone()
    rows = torch.tensor([s + 9 * i for i in range(2) for s in (0, 1, 6, 7, 8)])
    h = states
    for block, m in zip(Net(end).blocks, edits, strict=True):
        h = reference.edit_rows(block(h), rows, m.R, m.W, m.R, m.b)
    wanted = h + states
    weights = [p for m in edits for p in m.parameters()]
    gradients = torch.autograd.grad(wanted.square().sum(), weights)
    with torch.no_grad():
        torch.testing.assert_close(model(states, by_name=by_name), wanted)
    found = model(states, by_name=by_name)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(states, kept)
    for g, w in zip(torch.autograd.grad(found.square().sum(), weights), gradients, strict=True):
        torch.testing.assert_close(g, w)


def test_a_block_of_transformers_that_somebody_has_skipped():
    inputs, base, plain = batch("right"), make("llama"), make("llama")
    for model in (base, plain):
        blocks(model)[1].forward = lambda hidden_states, **_: hidden_states
    embeds = base.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "output_hidden_states": True}
    torch.manual_seed(2)
    model = get_reft_model(base, ReftConfig(positions="f2+l3", r=3))
    kept = embeds.clone()
    with torch.no_grad(), hooked(plain, adapter_weights(model), columns(inputs["attention_mask"], 2, 3)):
        wanted = plain(**given)
    with torch.no_grad():
        found = model(**given)
    assert torch.equal(embeds, kept)
    for state, w in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(state, w)
