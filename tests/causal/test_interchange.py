"""Interchange interventions: the primitive against torch, and whole models against hooks written by hand."""

from __future__ import annotations

import pytest
import torch
from common import DEVICES, assert_as_good
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastreft import ReftConfig, functional, get_reft_model, reference
from fastreft.causal import Kept, Subspace, collect, interchange
from fastreft.settings import EMBEDDED_PATH


def orthonormal(r: int, d: int, dtype=torch.float32) -> torch.Tensor:
    R = torch.randn(r, d, dtype=dtype)
    functional.retract_([R])
    return R


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_primitive_and_its_gradients(device, dtype, masked):
    with torch.device(device):
        torch.manual_seed(0)
        h, s, R, g = torch.randn(7, 40), torch.randn(7, 40), orthonormal(3, 40), torch.randn(7, 40)
        mask = torch.tensor([0.2, 1.0, 0.7]) if masked else None
        results = []
        mine, plain = functional.interchange, reference.interchange
        for interchanged, wide in ((mine, dtype), (plain, dtype), (plain, torch.float64)):
            at = [h.to(dtype).to(wide), s.to(dtype).to(wide), R.to(torch.float64 if wide is torch.float64 else R.dtype)]
            at += [mask.to(at[2].dtype)] if masked else []
            at = [t.clone().requires_grad_() for t in at]
            out = interchanged(*at)
            results.append([out, *torch.autograd.grad(out, at, g.to(dtype).to(out.dtype))])
        for i in range(len(results[0])):
            assert_as_good(*[[made[i]] for made in results])


def test_gradcheck():
    torch.manual_seed(0)
    h, s, R, mask = (
        torch.randn(4, 6).double(),
        torch.randn(4, 6).double(),
        orthonormal(2, 6).double(),
        torch.rand(2).double(),
    )
    inputs = [t.requires_grad_() for t in (h, s, R, mask)]
    assert torch.autograd.gradcheck(functional.interchange, inputs)


def test_listed_rows():
    torch.manual_seed(0)
    h, R, rows = torch.randn(2, 3, 8), orthonormal(2, 8), torch.tensor([4, -1, 0])
    s = torch.randn(3, 8)
    expected = h.clone()
    expected.view(-1, 8)[[4, 0]] = reference.interchange(h.view(-1, 8)[[4, 0]], s[[0, 2]], R)
    got = functional.interchange_rows_(h, rows, s, R)
    assert got is h
    torch.testing.assert_close(h, expected)
    other = torch.randn(2, 8, 3).transpose(1, 2)  # whose rows no view lists
    before = other.clone()
    functional.interchange_rows_(other, rows, s, R)
    torch.testing.assert_close(other[1, 1], reference.interchange(before[1, 1], s[0], R))
    assert torch.equal(other[1, 2], before[1, 2])
    with pytest.raises(ValueError, match=r"s is \(2, 8\); it must have a row for each"):
        functional.interchange_rows_(h, rows, s[:2], R)


def test_a_row_that_is_its_own_source_stays():
    h = torch.randn(5, 16) * 1000
    assert torch.equal(functional.interchange(h, h.clone(), orthonormal(4, 16)), h)


def tiny(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def batch(lengths: list[int], side: str) -> dict[str, torch.Tensor]:
    most = max(lengths)
    ids, mask = torch.randint(3, 50, (len(lengths), most)), torch.zeros(len(lengths), most, dtype=torch.long)
    for i, length in enumerate(lengths):
        mask[i, slice(most - length, None) if side == "left" else slice(length)] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def by_hand(model, module, base, change):
    """The logits with ``change(hidden)`` in place of what a module gives."""
    handle = module.register_forward_hook(lambda _m, _a, out: change(out if isinstance(out, torch.Tensor) else out[0]))
    try:
        with torch.no_grad():
            return model(**base).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_that_differ_under_padding(side):
    """The base's last token takes the source's second, in R, each where its own padding puts it."""
    model, R = tiny(), orthonormal(3, 16)
    base, source = batch([3, 6, 5], side), batch([7, 2, 4], side)
    with torch.no_grad():
        states = model(**source, output_hidden_states=True).hidden_states[2]
    theirs = len(model.model.layers[1]._forward_hooks)  # Transformers' own, which record hidden states
    starts = source["attention_mask"].argmax(1)
    s = states[torch.arange(3), starts + 1]
    last = base["attention_mask"].cumsum(1).argmax(1)

    def change(hidden):
        hidden = hidden.clone()
        hidden[torch.arange(3), last] = reference.interchange(hidden[torch.arange(3), last], s, R)
        return hidden

    expected = by_hand(model, model.model.layers[1], base, change)
    with interchange(model, {1: ("l1", source, 1)}, R), torch.no_grad():
        got = model(**base).logits
    torch.testing.assert_close(got, expected)
    kept = collect(model, source, {1: 1})[1]
    assert torch.equal(kept.values[:, 0], s)
    with interchange(model, {1: (last[:, None], kept)}, R), torch.no_grad():
        assert torch.equal(model(**base).logits, got)
    with torch.no_grad():  # and nothing stays behind
        assert not torch.equal(model(**base).logits, got)
    assert not model._forward_hooks and len(model.model.layers[1]._forward_hooks) == theirs


def test_two_sources_for_two_variables_of_one_subspace():
    model, subspace = tiny(), Subspace(16, {"a": 2, "b": 3})
    base, one, two = batch([4, 4], "right"), batch([4, 4], "right"), batch([4], "right")
    exchanged = {0: (-1, {"a": one, "b": two}, -2)}
    a, b = (collect(model, each, {0: -2})[0].values[:, 0] for each in (one, two))

    def change(hidden):
        hidden = hidden.clone()
        now = reference.interchange(hidden[:, -1], a, subspace.R[:2])
        hidden[:, -1] = reference.interchange(now, b.expand(2, -1), subspace.R[2:])
        return hidden

    expected = by_hand(model, model.model.layers[0], base, change)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with interchange(model, exchanged, subspace), torch.no_grad():
        torch.testing.assert_close(model(**base).logits, expected)
    handle.remove()
    assert len(calls) == 3  # a forward a source, and the base's


@pytest.mark.parametrize("component", ["block_input", "mlp_output", "attention_output"])
def test_whole_vectors_at_every_component(component):
    """With all of a source's hidden states the model says what it says of the source from there on, where that is all there
    is."""
    model = tiny()
    base, source = batch([5, 5], "right"), batch([5, 5], "right")
    place = (0, component)
    with interchange(model, {place: ("all", source)}), torch.no_grad():
        got = model(**base).logits
    with torch.no_grad():
        assert not torch.equal(got, model(**base).logits)
        if component == "block_input":
            torch.testing.assert_close(got, model(**source).logits)
    name = {"mlp_output": "mlp", "attention_output": "self_attn", "block_input": ""}[component]
    named = f"model.layers.0.{name}".rstrip(".")
    with interchange(model, {(named, "input") if not name else named: ("all", source)}), torch.no_grad():
        assert torch.equal(model(**base).logits, got)


def test_generation_exchanges_the_prompt_alone():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_PATH)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_PATH, dtype=torch.float32)
    prompts = tokenizer(["The old king was", "A girl"], padding=True, padding_side="left", return_tensors="pt")
    source = tokenizer(
        ["The little dog was", "The sea is wide"], padding=True, padding_side="left", return_tensors="pt"
    )
    with interchange(model, {2: ("l1", source)}):
        written = model.generate(**prompts, max_new_tokens=5, do_sample=False)
    plain = model.generate(**prompts, max_new_tokens=5, do_sample=False)
    with interchange(model, {2: ("l1", source)}), torch.no_grad():
        first = model(**prompts).logits[:, -1].argmax(-1)
    assert torch.equal(written[:, prompts["input_ids"].shape[1]], first)
    assert not torch.equal(written, plain)


def test_a_prompt_that_comes_in_parts():
    """Its positions lie in one part or another; a step behind it, by hand too, has none of them and is left alone."""
    model, base, source = tiny(), batch([6, 6], "right"), batch([6, 6], "right")
    columns = torch.tensor([[1, -1], [2, 5]])
    for where, theirs in (("all", "all"), (None, None), (4, 4), (columns, torch.tensor([[1, 0], [2, 5]]))):
        with interchange(model, {1: (where, source, theirs)}):
            written, parts = (
                model.generate(**base, max_new_tokens=4, do_sample=False, pad_token_id=0, **more)
                for more in ({}, {"prefill_chunk_size": 4})
            )
        assert torch.equal(written, parts)
    longer = {"input_ids": torch.cat([base["input_ids"], torch.tensor([[7], [8]])], 1)}
    with interchange(model, {1: (5, source)}), torch.no_grad():
        first = model(**base, use_cache=True)
        mask = torch.ones(2, 7, dtype=torch.long)
        step = model(input_ids=longer["input_ids"][:, 6:], past_key_values=first.past_key_values, attention_mask=mask)
        torch.testing.assert_close(step.logits[:, -1], model(**longer).logits[:, -1])


def test_a_source_for_each_sample_or_one_for_all():
    """Beams are of their samples; without them a sample has a source of its own, or that of all."""
    model, base, source = tiny(), batch([4] * 4, "right"), batch([4, 4], "right")
    one = {name: value[:1] for name, value in source.items()}
    for fits in (one, batch([4] * 4, "right")):
        with interchange(model, {1: ("l1", fits)}), torch.no_grad():
            model(**base)
    said = r"it must be \(4, 1, 16\), or one sample for all"
    with pytest.raises(ValueError, match=said), interchange(model, {1: ("l1", source)}):
        model(**base)
    two = {name: value[:2] for name, value in base.items()}
    with interchange(model, {1: ("l1", source)}):
        model.generate(**two, max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("kind", ["loreft", "bias"])
@pytest.mark.parametrize("place", [1, (1, "mlp_output")])
def test_behind_an_adapter_of_the_same_place(kind, place):
    """What is kept and exchanged is what the adapter leaves, as the layers behind it have it; with its gradients."""
    component = "mlp_output" if place != 1 else "block_output"
    config = ReftConfig(intervention_type=kind, r=2, layers_to_transform=[1], component=component, positions="all")
    model = get_reft_model(tiny(), config).eval()
    torch.manual_seed(1)
    edits = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in edits.values():
        p.data.add_(torch.randn_like(p), alpha=0.5)
    base, source = batch([4, 4], "right"), batch([4, 4], "right")
    block = model.get_base_model().model.layers[1]
    module, seen = block if place == 1 else block.mlp, []
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out))  # behind the adapter's
    with torch.no_grad():
        model(**source)
    handle.remove()
    kept = collect(model, source, {place: -1})[place]
    assert torch.equal(kept.values[:, 0], seen[0][:, -1])
    wanted = list(edits.values())

    def change(_module, _inputs, hidden):
        hidden = hidden.clone()
        hidden[:, -1] = kept.values[:, 0]
        return hidden

    with interchange(model, {place: (-1, kept)}):
        mine = model(**base).logits
    handle = module.register_forward_hook(change)
    plain = model(**base).logits
    handle.remove()
    torch.testing.assert_close(mine, plain)
    grads = (torch.autograd.grad(logits.square().sum(), wanted) for logits in (mine, plain))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_gradients_through_the_sources_and_R_in_any_module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)).requires_grad_(False)
    subspace, base, source = Subspace(8, 2), torch.randn(5, 6), torch.randn(5, 6, requires_grad=True)
    kept = collect(net, source, {"2": None}, grad=True)["2"]
    with interchange(net, {"2": (None, kept)}, subspace):
        got = net(base)
    hidden = net[:3](base)
    expected = net[3](reference.interchange(hidden, net[:3](source), subspace.R))
    torch.testing.assert_close(got, expected)
    for mine, plain in zip(*(torch.autograd.grad(o.sum(), [subspace.R, source]) for o in (got, expected)), strict=True):
        torch.testing.assert_close(mine, plain)


def test_bad_input_is_one_sentence():
    model, base = tiny(), batch([3, 4], "right")
    for exchanges, said in (
        ({9: ("l1", base)}, "layer is 9; it must be an integer below 3"),
        ({"model.nothing": ("l1", base)}, "has no module 'model.nothing'"),
        ({(0, "middle"): ("l1", base)}, "component is 'middle'"),
        ({0: base}, "must be (base positions, source, source positions)"),
        ({0: ("l1", base, 3)}, "positions is 3, and sample 0 of the source has no such token"),
        ({0: ("l2", base, "l1")}, r"the source is (2, 1, 16)"),
        ({0: ("x1", base)}, "positions is 'x1'"),
        ({0: (3, base, "l1")}, "positions is 3, and sample 0 of the base has no such token"),
        ({0: (-4, base, "l1")}, "positions is -4, and sample 0 of the base has no such token"),
        ({0: ([0, 9], base, "l2")}, "positions is 9, and sample 0 of the base has no such token"),
        ({0: ("l4", base, "l1")}, "positions is 'l4', and sample 0 of the base has no such token"),
        ({0: (torch.tensor([[1], [-1]]), base, 1)}, "a tensor (2, 1), and sample 1 of the base has no such token"),
        ({0: (0, base, torch.tensor([[1], [-1]]))}, "a tensor (2, 1), and sample 1 of the source has no such token"),
        ({0: ([], base)}, "positions is []; there must be one at least"),
        ({0: ("l1", {})}, "exchanges[0] has no sources"),
        ({0: ("l1", {"a": base, "typo": base}, "l1", Subspace(16, {"a": 4, "b": 4}))}, "has sources for a, typo; the"),
        ({0: ("l1", {"a": base}, "l1", None)}, "exchanges[0] has sources for a; there is no subspace"),
        ({0: ("l1", base, "l1", 4)}, "subspace is 4; it must be a Subspace, a matrix (r, d), or None"),
    ):
        with pytest.raises(ValueError) as caught, interchange(model, exchanges, orthonormal(1, 16)):
            model(**base)
        assert said in str(caught.value)
        assert not model.model.layers[0]._forward_hooks
    kept = Kept(torch.zeros(2, 1, 16))
    with pytest.raises(ValueError, match="no forward of the model reached it"), interchange(model, {0: ("l1", kept)}):
        pass
    with pytest.raises(ValueError, match="a column twice"), interchange(model, {0: (torch.zeros(2, 2).long(), kept)}):
        model(**base)
