"""An adapter's edits at another strength: h + s (edit(h) - h), of every kind, and the model's own at 0 and 1."""

import json

import pytest
import torch
from common import assert_as_good
from peft import LoraConfig, get_peft_model
from shell import fails
from tiny import batch, logits, make

from fastreft import ReftConfig, get_reft_model
from fastreft.cli import main
from fastreft.interventions import INTERVENTIONS
from fastreft.tasks.models import load_base, save_adapter

ROWS = torch.tensor([0, 3, 7, 8, -1])


def made(kind, act_fn, dtype=torch.float32):
    torch.manual_seed(0)
    m = INTERVENTIONS[kind](embed_dim=32, low_rank_dimension=3, act_fn=act_fn, add_bias=True).to(dtype)
    for name, p in m.named_parameters():
        if name in ("b", "c"):
            torch.nn.init.normal_(p)
    return m


def by_hand(m, h, s):
    """The definition, from the edit as it is; the listed rows alone."""
    chosen = torch.zeros(h.shape[0], 1, dtype=torch.bool)
    chosen[ROWS[ROWS >= 0]] = True
    return torch.where(chosen, h + s * (m(h) - h), h)


@pytest.mark.parametrize("kind", INTERVENTIONS)
@pytest.mark.parametrize("act_fn", [None, "silu"])
@pytest.mark.parametrize("s", [0.5, -1.0])
def test_every_kind_and_its_gradients(kind, act_fn, s, calls):
    torch.manual_seed(1)
    h, g = torch.randn(9, 32), torch.randn(9, 32)

    def run(dtype, scaled):
        m, x = made(kind, act_fn, dtype), h.to(dtype, copy=True).requires_grad_()
        if scaled:
            m.scale = s
            out = m(x * 1, rows=ROWS)
        else:
            out = by_hand(m, x, s)
        (out * g.to(dtype)).sum().backward()
        return [out.detach(), x.grad, *(p.grad for _, p in sorted(m.named_parameters()) if p.grad is not None)]

    assert_as_good(run(torch.float32, True), run(torch.float32, False), run(torch.float64, False))
    m = made(kind, act_fn)
    m.scale = s
    dense, listed = m(h), m(h.clone(), rows=torch.arange(9))
    torch.testing.assert_close(dense, listed)
    m.scale = 0.0
    assert torch.equal(m(h), h) and torch.equal(m(h.clone(), rows=ROWS), h)


@pytest.mark.parametrize("settings", [{}, {"tied": False}, {"tied": "position"}, {"component": "block_input"}])
def test_of_a_model(settings):
    base, inputs = make("llama"), batch()
    plain = logits(base, inputs)
    model = get_reft_model(base, ReftConfig(r=3, positions="f2+l3", **settings))
    model.add_adapter("other", ReftConfig(r=2, positions="all"))
    trained = logits(model, inputs)
    model.set_scale(0, "default")
    assert torch.equal(logits(model, inputs), plain)
    model.set_scale(0.5)
    half = logits(model, inputs)
    assert not torch.allclose(half, plain) and not torch.allclose(half, trained)
    model.set_adapter("other")
    other = logits(model, inputs)
    model.set_scale(1, ["other"])
    assert not torch.equal(logits(model, inputs), other)
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), half)  # its own is as it was
    model.set_scale(1)
    assert torch.equal(logits(model, inputs), trained)


def test_what_is_saved_is_what_was_trained(tmp_path):
    model = get_reft_model(make("llama"), ReftConfig(r=3))
    for name in ("whole", "half"):
        model.save_pretrained(tmp_path / name)
        model.set_scale(0.5)
    whole, half = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "half"))
    assert whole == half


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True])
def test_scales_that_are_none(scale):
    model = get_reft_model(make("llama"), ReftConfig(r=3))
    with pytest.raises(ValueError, match=r"scale is .*; it must be a finite number"):
        model.set_scale(scale)
    with pytest.raises(ValueError, match="adapters is 'nobody'; the ReFT adapters of this model are default"):
        model.set_scale(0.5, "nobody")


def test_from_the_command_line(tmp_path, capsys):
    adapter, rows = str(tmp_path / "adapter"), tmp_path / "rows.json"
    save_adapter(get_reft_model(load_base("embedded"), ReftConfig(r=4, positions="all")), None, "embedded", adapter)
    written = {}
    ask = ["generate", "--adapter", adapter, "--prompt", "The king", "--base", "--max_new_tokens", "8"]
    for strength in ("0", "1", "-0.5"):
        assert main([*ask, "--output", str(rows), "--strength", strength]) == 0
        (written[strength],) = json.loads(rows.read_text())
    assert main([*ask, "--output", str(rows)]) == 0
    assert json.loads(rows.read_text()) == [written["1"]]
    base = written["0"]["base"]
    assert written["0"]["adapter"] == base != written["1"]["adapter"]
    assert written["-0.5"]["adapter"] not in (base, written["1"]["adapter"]) and written["-0.5"]["base"] == base
    fails(main([*ask, "--strength", "nan"]), capsys, "strength is nan; it must be a finite number")
    lora = str(tmp_path / "lora")
    save_adapter(get_peft_model(load_base("embedded"), LoraConfig(target_modules=["q_proj"])), None, "embedded", lora)
    fails(main(["generate", "--adapter", lora, "--prompt", "x", "--strength", "0"]), capsys, "strength is of a ReFT")
