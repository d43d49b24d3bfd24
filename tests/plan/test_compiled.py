"""A compiled forward that edits nothing, or other tokens than meant, says so as an eager one does."""

import warnings

import pytest
import torch
from checkpoints import labelled
from checkpoints import made as made_of
from tiny import batch
from transformers import DynamicCache


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def made(kind="llama"):
    """With one block, as it is the compiler that takes the time."""
    return made_of(kind=kind, shape={"num_hidden_layers" if kind == "llama" else "n_layer": 1})


def compiled(model, backend="eager", **settings):
    """What is refused is in the graph: one case asks a backend that rewrites it, which takes its time, whether it stays."""
    return torch.compile(model, backend=backend, **settings)


@pytest.mark.parametrize("what", ["no prompt", "no positions", "padding"])
def test_training_that_edits_nothing_is_refused(what):
    inputs, model = batch("left"), made()
    given = {"labels": labelled(inputs)}
    if what == "no prompt":
        given["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    else:
        columns = [[-1], [-1], [-1]] if what == "no positions" else [[0], [1], [-1]]
        given["reft_positions"] = torch.tensor(columns)
    whole = compiled(model.get_base_model(), "aot_eager") if what == "no prompt" else compiled(model)
    with pytest.raises(RuntimeError, match="this compiled forward in training edits nothing"):
        whole(**inputs, **given)


def test_training_after_a_cache_is_refused():
    inputs, model, cache = batch("right", (9, 9, 9)), made(), DynamicCache()
    ids = inputs["input_ids"]
    with torch.no_grad():
        model.get_base_model()(input_ids=ids[:, :3], past_key_values=cache)
    with pytest.raises(RuntimeError, match="its past_key_values hold tokens"):
        compiled(model)(input_ids=ids[:, 3:], past_key_values=cache, labels=ids[:, 3:])


def test_training_that_edits_something_is_one_graph():
    inputs, model = batch("left"), made()
    model.get_base_model().disable_input_require_grads()
    given = inputs | {"labels": labelled(inputs), "use_cache": False}
    model(**given).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    whole = compiled(model.get_base_model(), "aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        whole(**given).loss.backward()
    assert len(wanted) == 3
    for name, g in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, g)
    with model.disable_adapter():
        torch._dynamo.reset()
        compiled(model)(**inputs, labels=inputs["input_ids"])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_model_within_is_compiled_by_itself(kind):
    inputs, model = batch("left"), made(kind=kind)
    base = model.get_base_model()
    (base.model if kind == "llama" else base.transformer).compile(backend="eager")
    for _ in range(3):
        assert torch.isfinite(model(**inputs, labels=labelled(inputs)).loss)
    with pytest.raises(RuntimeError, match="which ran compiled"):
        model.reft_report()


@pytest.mark.parametrize("trains", [True, False])
def test_a_forward_without_labels_is_said(trains):
    model = made().train(trains)
    with pytest.warns(UserWarning, match=f"this forward in {'training' if trains else 'evaluation'} has no labels"):
        compiled(model.get_base_model())(**batch("left"))


def test_the_report_is_not_that_of_an_earlier_forward():
    inputs, model = batch("left"), made()
    model(**inputs, labels=labelled(inputs))
    whole = compiled(model)
    for _ in range(2):
        model(**inputs, labels=labelled(inputs))
        whole(**inputs, labels=labelled(inputs))
    with pytest.raises(RuntimeError, match="which ran compiled and keeps no record"):
        model.reft_report()
    model(**inputs, labels=labelled(inputs))
    assert model.reft_report().prompt_lengths == [5, 2, 7]
