"""How an edit starts: as the identity where it can be, or as pyreft's does."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import batch, make
from transformers.activations import ACT2FN

from fastreft import ReftConfig, get_reft_model
from fastreft.interventions import INTERVENTIONS
from fastreft.ops.names import METHODS, may_be_identity

pytestmark = pytest.mark.default_start

D, R = 24, 3
CAN = [method for method in METHODS if method != "consreft"]


def intervention(method, act_fn=None, **keywords):
    torch.manual_seed(0)
    return INTERVENTIONS[method](embed_dim=D, low_rank_dimension=R, act_fn=act_fn, add_bias=True, **keywords)


@pytest.mark.parametrize("method", CAN)
def test_the_identity_changes_no_bit_and_can_be_trained(method):
    m = intervention(method, init_weights="identity")
    h = torch.randn(5, D)
    assert torch.equal(m(h), h)
    assert torch.equal(m(h.clone(), rows=torch.tensor([0, 3])), h)
    (m(h) * torch.randn(5, D)).sum().backward()
    first = m.b if method == "lobireft" else m.W
    assert first.grad.abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_random_start_is_the_default_of_a_module_and_draws_what_it_drew(method):
    default, said = intervention(method), intervention(method, init_weights="random")
    for name, value in said.state_dict().items():
        assert torch.equal(value, default.state_dict()[name])
    if method in CAN:  # the frame that the identity starts from is the random one's
        identity = intervention(method, init_weights="identity")
        main = "R" if identity.orthonormal else "P"
        assert torch.equal(getattr(identity, main), getattr(default, main))


@pytest.mark.parametrize("act_fn", sorted(ACT2FN))
@pytest.mark.parametrize("method", ["direft", "nodireft"])
def test_activations_that_leave_0_alone_are_told_from_others(method, act_fn):
    zero = torch.zeros(4)
    act = ACT2FN[act_fn]
    assert may_be_identity(method, act_fn) is bool((act(zero) == 0).all())


@pytest.mark.parametrize(
    ("method", "act_fn"), [("consreft", None), ("loreft", "relu"), ("noreft", "silu"), ("direft", "sigmoid")]
)
def test_an_edit_that_cannot_be_the_identity(method, act_fn):
    with pytest.raises(ValueError, match="init_weights is 'identity'"):
        intervention(method, act_fn, init_weights="identity")
    with pytest.raises(ValueError, match="init_weights is 'identity'"):
        ReftConfig(intervention_type=method, act_fn=act_fn, init_weights="identity")
    assert ReftConfig(intervention_type=method, act_fn=act_fn).start() == "random"


def test_another_start():
    for call in (lambda: intervention("loreft", init_weights="zero"), lambda: ReftConfig(init_weights=True)):
        with pytest.raises(ValueError, match="init_weights is "):
            call()


@pytest.mark.parametrize("settings", [{}, {"positions": "all"}, {"tied": False}, {"component": "attention_output"}])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-cls"])
def test_a_fresh_adapter_changes_no_logit_until_it_is_trained(kind, settings):
    base = make(kind)
    inputs = batch("right")
    before = base(**inputs).logits
    model = get_reft_model(base, ReftConfig(r=R, **settings))
    assert torch.equal(model(**inputs).logits, before)
    model.train()
    model(**inputs, reft_prompt_lengths=inputs["attention_mask"].sum(1)).logits.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(name.endswith(".W") for name in trained)
    random = get_reft_model(make(kind), ReftConfig(r=R, init_weights="random", **settings))
    assert not torch.allclose(random(**inputs).logits, before, atol=1e-3)


def test_a_head_that_nobody_trains_is_said():
    with pytest.warns(
        UserWarning, match="the head of this BertForSequenceClassification is not trained: give task_type='SEQ_CLS'"
    ):
        get_reft_model(make("bert-cls"), ReftConfig(r=R))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_reft_model(make("bert-cls"), ReftConfig(r=R, task_type="SEQ_CLS"))
        get_reft_model(make("bert-cls"), ReftConfig(r=R, modules_to_save=["classifier"]))
        get_reft_model(make("llama"), ReftConfig(r=R))
