"""ReFT as a PEFT method on tiny Llama, GPT-2 and BERT models, against plain hooks round the reference."""

import copy
import warnings

import pytest
import torch
from tiny import LAYERS, adapter_weights, batch, blocks, columns, hooked, logits, make, recorded
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

import fastreft
from fastreft import ReftConfig, get_reft_model
from fastreft.models.blocks import find_blocks

pytestmark = pytest.mark.usefixtures("everything_on")

KINDS = ["llama", "gpt2", "bert", "bert-cls"]


def labels_of(kind, inputs):
    """Labels as the model takes them; for a causal LM the answer starts at column 6 of 9."""
    mask = inputs["attention_mask"]
    if kind == "bert-cls":
        return torch.tensor([0, 1, 0])
    labels = (inputs["input_ids"] % 2) if kind == "bert" else inputs["input_ids"].clone()
    labels = labels.masked_fill(mask == 0, -100)
    if kind != "bert":
        labels[:, :6] = -100
    return labels


def prompts(kind, inputs, labels, first=2, last=2):
    return columns(inputs["attention_mask"], first, last, labels if kind in ("llama", "gpt2", "stories") else None)


# ---- the edit ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_exactly_the_chosen_rows_of_the_chosen_layers_change(kind, side):
    inputs = batch(side)
    labels = labels_of(kind, inputs)
    model = get_reft_model(make(kind), ReftConfig(positions="f2+l2", layers_to_transform=[1]))
    base = make(kind)
    with torch.no_grad(), recorded(base) as plain:
        base(**inputs, labels=labels)
    with torch.no_grad(), recorded(model) as edited:
        model(**inputs, labels=labels)
    with torch.no_grad(), hooked(base, adapter_weights(model), prompts(kind, inputs, labels)), recorded(base) as wanted:
        base(**inputs, labels=labels)
    assert torch.equal(edited[0], plain[0])
    for found, right in zip(edited, wanted, strict=True):
        torch.testing.assert_close(found, right)
    changed = (edited[1] != plain[1]).any(-1)
    assert [row.nonzero().flatten().tolist() for row in changed] == [sorted(c) for c in prompts(kind, inputs, labels)]


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("kind", [*KINDS, "stories"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_are_those_of_plain_hooks(kind, checkpointing):
    inputs = batch("right")
    labels = labels_of(kind, inputs)
    model = get_reft_model(make(kind).double(), ReftConfig(positions="f2+l2")).double()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    loss = model(**inputs, labels=labels).loss
    if kind != "bert-cls":
        model(**{k: v.flip(0) for k, v in inputs.items()})  # another forward before the backward
    loss.backward()
    base, weights = make(kind).double().train(), adapter_weights(model)
    with hooked(base, weights, prompts(kind, inputs, labels)):
        wanted = base(**inputs, labels=labels).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    assert len(weights) == len(blocks(base))
    for i, tensors in weights.items():
        m = blocks(model)[i].reft.reft_edit["default"]
        for name, right in zip("RWb", tensors, strict=True):
            torch.testing.assert_close(getattr(m, name).grad, right.grad, msg=f"layer {i} {name}")


def test_untied_prefix_and_suffix_have_an_intervention_each():
    inputs = batch("left")
    model = get_reft_model(make("llama"), ReftConfig(positions="f2+l2", tied=False, layers_to_transform=0))
    reft = blocks(model)[0].reft
    before = logits(model, inputs)
    plain = make("llama")
    chosen = columns(inputs["attention_mask"], 2, 2)

    def weights(group):
        return {0: tuple(getattr(group["default"], name).detach() for name in ("R", "W", "b"))}

    prefix = hooked(plain, weights(reft.reft_edit), [c[:2] for c in chosen])
    suffix = hooked(plain, weights(reft.reft_suffix), [c[2:] for c in chosen])
    with prefix, suffix:
        torch.testing.assert_close(before, logits(plain, inputs))
    index = torch.tensor([c[:2] for c in chosen]), torch.tensor([c[2:] for c in chosen])
    assert torch.equal(before, logits(model, inputs | {"reft_positions": torch.stack(index)}))
    with pytest.raises(
        ValueError, match=r"reft_positions has shape \(3, 2\); with tied=False it must be \(2, batch, n\)"
    ):
        model(**inputs, reft_positions=index[0])
    shared = get_reft_model(make("llama"), ReftConfig(positions="f2+l2"))
    with pytest.raises(
        ValueError, match=r"reft_positions has shape \(2, 3, 2\); with tied=True it must be \(batch, n\)"
    ):
        shared(**inputs, reft_positions=torch.stack(index))


@pytest.mark.parametrize("kind", KINDS)
def test_explicit_positions(kind):
    inputs = batch("right")
    model = get_reft_model(make(kind), ReftConfig())
    plain = make(kind)
    found = logits(model, inputs | {"reft_positions": torch.tensor([[1, 3, 3], [-1, -1, 2], [0, 8, -1]])})
    with hooked(plain, adapter_weights(model), [[1, 3], [2], [0, 8]]):
        torch.testing.assert_close(found, logits(plain, inputs))


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("intervention_type", ["noreft", "consreft", "lobireft", "direft", "nodireft"])
def test_every_intervention_trains(intervention_type):
    config = ReftConfig(intervention_type=intervention_type, dropout=0.1, act_fn="relu", r=2)
    model = get_reft_model(make("llama"), config).train()
    inputs = batch("left")
    model(**inputs, labels=labels_of("llama", inputs)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_inner_model_called_directly_and_positional_arguments():
    inputs = batch("left")
    model = get_reft_model(make("llama"), ReftConfig(positions="f2+l2"))
    with torch.no_grad():
        wanted = model(**inputs, output_hidden_states=True).hidden_states[-1]
        inner = model.get_base_model().model
        assert torch.equal(inner(**inputs).last_hidden_state, wanted)
        assert torch.equal(inner(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state, wanted)


def test_a_failed_forward_leaves_no_plan():
    if torch.get_default_device().type != "cpu":
        pytest.skip("a GPU is not asked whether a position is past the end")
    inputs = batch("left")
    model = get_reft_model(make("llama"), ReftConfig())
    with pytest.raises(IndexError, match="reft_positions holds 9, past the last of 9 tokens"):
        model(**inputs, reft_positions=torch.tensor([[9]]))
    assert model.base_model._shared.local.here.plan is None


def test_labels_from_the_first_token_are_warned_of_once():
    inputs = batch("right")
    model = get_reft_model(make("llama"), ReftConfig())
    with pytest.warns(UserWarning, match="no sample of this batch has a prompt"):
        model(**inputs, labels=inputs["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs, labels=inputs["input_ids"])


# ---- what blocks return, and how they are recomputed -----------------------------------------------------------------


class Block(nn.Module):
    """A block that returns its hidden state in the form asked for."""

    def __init__(self, form):
        super().__init__()
        self.form, self.linear = form, nn.Linear(8, 8)

    def forward(self, x):
        if self.form == "same":
            return x
        if self.form == "view":
            return torch.cat([self.linear(x), x], -1).chunk(2, -1)[0]
        x = self.linear(x)
        forms = {"tuple": (x, None), "list": [x, None], "output": BaseModelOutput(last_hidden_state=x)}
        return forms.get(self.form, x)


class Toy(nn.Module):
    """Blocks checkpointed as Transformers 4 does it, hooks and all; ``config`` is all that PEFT asks for."""

    def __init__(self, form="tensor"):
        super().__init__()
        self.config = PretrainedConfig(hidden_size=8)
        self.blocks = nn.ModuleList(Block(form) for _ in range(2))
        self.gradient_checkpointing = False

    def forward(self, inputs_embeds, attention_mask=None):
        x = inputs_embeds
        for block in self.blocks:
            x = self._gradient_checkpointing_func(block, x) if self.gradient_checkpointing else block(x)
            x = x if isinstance(x, torch.Tensor) else x[0]
        return x


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "output", "view", "same"])
def test_every_form_of_output_is_edited(form):
    torch.manual_seed(0)
    plain = Toy(form)
    model = get_reft_model(copy.deepcopy(plain), ReftConfig(positions="l2"))
    x = torch.randn(2, 5, 8, requires_grad=True)
    given = x.detach().clone()
    found = model(inputs_embeds=x)
    found.square().sum().backward()
    assert torch.equal(x, given)
    weights = {
        i: tuple(b.reft.reft_edit["default"].weights()[k] for k in (0, 1, 3)) for i, b in enumerate(model.blocks)
    }
    wanted_x = given.clone().requires_grad_()
    h = wanted_x
    for i, block in enumerate(plain.blocks):
        h = block(h)
        h = h if isinstance(h, torch.Tensor) else h[0]
        R, W, b = weights[i]
        h = fastreft.reference.edit_rows(h, torch.tensor([3, 4, 8, 9]), R, W, R, b)
    torch.testing.assert_close(found, h)
    h.square().sum().backward()
    torch.testing.assert_close(x.grad, wanted_x.grad)


@pytest.mark.usefixtures("calls")
def test_an_edit_is_in_place_where_it_can_be():
    model = get_reft_model(Toy(), ReftConfig(positions="l2", layers_to_transform=0)).eval()
    seen = []
    block = model.blocks[0]
    block.linear.register_forward_hook(lambda _m, _a, output: seen.append(output.data_ptr()))
    block.register_forward_hook(lambda _m, _a, output: seen.append(output.data_ptr()))
    model(inputs_embeds=torch.randn(2, 5, 8))
    assert seen[0] == seen[1]


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_blocks_take_the_rows_of_their_own_forward(use_reentrant):
    torch.manual_seed(0)
    model = get_reft_model(Toy(), ReftConfig(positions="l2")).train()
    x = torch.randn(2, 5, 8, requires_grad=True)
    grads = []
    for on in (False, True):
        model.zero_grad()
        toy = model.get_base_model()
        toy.gradient_checkpointing = on
        toy._gradient_checkpointing_func = lambda f, *a: checkpoint(f, *a, use_reentrant=use_reentrant)
        out = model(inputs_embeds=x)
        model(inputs_embeds=x, attention_mask=torch.tensor([[1, 1, 0, 0, 0]] * 2))
        out.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiled_forward(dropout):
    torch.manual_seed(0)
    model = get_reft_model(Toy(), ReftConfig(positions="f1+l2", dropout=dropout)).eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    wanted = model(inputs_embeds=x, attention_mask=mask)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(inputs_embeds=x, attention_mask=mask), wanted)


# ---- blocks --------------------------------------------------------------------------------------------------------


def test_find_blocks():
    assert find_blocks(make("llama")).names == [f"model.layers.{i}" for i in range(LAYERS)]
    assert find_blocks(make("gpt2")).names == [f"transformer.h.{i}" for i in range(LAYERS)]
    assert find_blocks(make("bert")).names == [f"bert.encoder.layer.{i}" for i in range(LAYERS)]


def test_lists_within_a_block_are_not_blocks():
    model = Toy()
    for block in model.blocks:
        block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    assert find_blocks(model).names == ["blocks.0", "blocks.1"]
