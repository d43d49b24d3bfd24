"""Our six interventions inside the real pyreft: trained, generated with, saved and loaded there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny import LAYERS, WIDTH, batch, make

theirs = pytest.importorskip("pyreft.reft_model", reason="pyreft is not installed: make test-pyreft")
import pyreft  # noqa: E402

import fastreft  # noqa: E402
from fastreft.pyreft import format  # noqa: E402

CLASSES = ("Loreft", "Noreft", "Consreft", "Lobireft", "Direft", "Nodireft")
R = 4
WHERE = {"sources->base": (None, [[[2, 8], [5, 8], [0, 8]]] * LAYERS)}


def inside(name, base, **settings):
    """A pyreft model with our intervention of that class in every layer."""
    made = getattr(fastreft, f"{name}Intervention")
    torch.manual_seed(3)
    config = pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": R,
                "intervention": made(embed_dim=WIDTH, low_rank_dimension=R, **settings),
            }
            for layer in range(LAYERS)
        ]
    )
    return pyreft.get_reft_model(base, config)


def their_own(name, base, like):
    """The same in pyreft's own class, with the same weights."""
    config = pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": R,
                "intervention": getattr(pyreft, f"{name}Intervention")(
                    embed_dim=WIDTH, low_rank_dimension=R, dtype=torch.float32, add_bias=False
                ),
            }
            for layer in range(LAYERS)
        ]
    )
    model = pyreft.get_reft_model(base, config)
    for ours, own in zip(like.interventions.values(), model.interventions.values(), strict=True):
        own.load_state_dict(format.to_tensors(ours))
    return model


def step(model, inputs):
    """(logits, loss) of pyreft's forward."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    _, output = model(inputs, unit_locations=WHERE, labels=labels)
    return output.logits, output.loss


@pytest.mark.parametrize("name", CLASSES)
def test_forward_and_gradients_are_those_of_pyrefts_class(name):
    inputs = batch("left")
    ours = inside(name, make("llama"))
    own = their_own(name, make("llama"), ours)
    (logits, loss), (their_logits, their_loss) = step(ours, inputs), step(own, inputs)
    torch.testing.assert_close(logits, their_logits, rtol=1e-4, atol=1e-5)
    loss.backward()
    their_loss.backward()
    for mine, other in zip(ours.interventions.values(), own.interventions.values(), strict=True):
        source = other.learned_source
        bias = source if isinstance(source, torch.nn.Parameter) else source.bias
        torch.testing.assert_close(mine.b.grad, bias.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_it_trains(name):
    model, inputs = inside(name, make("llama")), batch("left")
    assert model.count_parameters() == sum(p.numel() for m in model.interventions.values() for p in m.parameters()) > 0
    optimizer = torch.optim.AdamW(
        model.get_trainable_parameters(), lr=2e-2
    )  # any optimizer: it is taught at its first step
    losses = []
    for _ in range(25):
        loss = step(model, inputs)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert max(format.orthonormality_error(m) for m in model.interventions.values()) < 2e-6


@pytest.mark.parametrize("name", CLASSES)
def test_it_generates_what_pyrefts_class_generates(name):
    inputs = batch("left")
    ours = inside(name, make("llama"))
    own = their_own(name, make("llama"), ours)
    options = {"unit_locations": WHERE, "intervene_on_prompt": True, "max_new_tokens": 6, "do_sample": False}
    text = ours.generate(dict(inputs), **options)[1]
    assert torch.equal(text, own.generate(dict(inputs), **options)[1])
    assert not torch.equal(text, make("llama").generate(**inputs, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("settings", [{}, {"dtype": torch.bfloat16}, {"add_bias": True}], ids=str)
def test_it_saves_and_loads(name, settings, tmp_path):
    inputs = batch("left")
    model = inside(name, make("llama"), **settings)
    model.save(tmp_path / "saved")
    types = json.loads((tmp_path / "saved" / "config.json").read_text())["intervention_types"]
    assert types == [f"<class 'fastreft.pyreft.guests.{name}Intervention'>"] * LAYERS
    with torch.no_grad():
        wanted = step(model, inputs)[0]
        again = pyreft.ReftModel.load(str(tmp_path / "saved"), make("llama"))
        torch.testing.assert_close(step(again, inputs)[0], wanted, rtol=1e-6, atol=1e-6)
        # ... and fastreft reads what pyreft saved of ours.
        here = fastreft.pyreft.ReftModel.load(tmp_path / "saved", make("llama"))
        torch.testing.assert_close(step(here, inputs)[0], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_it_takes_weights_that_pyrefts_class_saved(name):
    inputs = batch("left")
    first, second = inside(name, make("llama")), inside(name, make("llama"))
    own = their_own(name, make("llama"), first)
    for mine, other in zip(second.interventions.values(), own.interventions.values(), strict=True):
        with torch.no_grad():
            mine.b.zero_()
        mine.load_state_dict(other.state_dict())
    torch.testing.assert_close(step(second, inputs)[0], step(first, inputs)[0], rtol=1e-4, atol=1e-5)


def test_a_class_may_be_given_in_place_of_a_module():
    config = pyreft.ReftConfig(
        representations={
            "layer": 1,
            "component": "block_output",
            "low_rank_dimension": R,
            "intervention_type": fastreft.LoreftIntervention,
        }
    )
    model = pyreft.get_reft_model(make("llama"), config)
    (intervention,) = model.interventions.values()
    assert isinstance(intervention, fastreft.LoreftIntervention)
    assert (intervention.embed_dim, intervention.r) == (WIDTH, R)


def test_string_components_load_with_our_modules(tmp_path):
    config = pyreft.ReftConfig(
        representations={
            "layer": 1,
            "component": "model.layers[1].mlp.output",
            "low_rank_dimension": R,
            "intervention": fastreft.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=R),
        }
    )
    model, inputs = pyreft.get_reft_model(make("llama"), config), batch("left")
    model.save(tmp_path)
    again = pyreft.ReftModel.load(str(tmp_path), make("llama"))
    where = {"sources->base": (None, [[[2], [5], [0]]])}
    wanted = model(inputs, unit_locations=where)[1].logits
    assert torch.equal(again(inputs, unit_locations=where)[1].logits, wanted)


def test_fastreft_imports_pyvene_only_when_pyvene_asks():
    code = (
        "import sys, fastreft, fastreft.pyreft;"
        "fastreft.LoreftIntervention(embed_dim=8, low_rank_dimension=2);"
        "assert not {'pyvene', 'pyreft'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
