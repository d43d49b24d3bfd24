"""``with model.reft(scale=, adapters=)``: strengths of a context, one a sample, and several adapters as one sum."""

import numpy as np
import pytest
import torch
from tiny import make

from fastreft import ReftConfig, get_reft_model


@pytest.fixture(scope="module", params=["llama", "bert"])
def model(request):
    torch.manual_seed(0)
    common = {"init_weights": "random"}
    made = get_reft_model(make(request.param), ReftConfig(r=3, positions="f2+l3", tied=False, **common), "ada")
    made.add_adapter("bob", ReftConfig(intervention_type="noreft", r=2, positions="all", **common))
    return made.eval()


def batch():
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model, **more):
    with torch.no_grad():
        return model(**batch(), **more)[0]


def test_a_strength_is_set_scales(model):
    model.set_adapter("ada")
    before = run(model)
    with model.reft():
        assert torch.equal(run(model), before)
    model.set_scale(-0.5, "ada")
    wanted = run(model)
    model.set_scale(1.0)
    with model.reft(-0.5):
        assert torch.equal(run(model), wanted)
        with model.reft(0):
            with model.disable_adapter():
                bare = run(model)
            assert torch.equal(run(model), bare)
        assert torch.equal(run(model), wanted)
    assert torch.equal(run(model), before)


def test_each_sample_has_its_own(model):
    scales = [1.0, -2.0, 0.0]
    with model.reft(scales, "bob"):
        mixed = run(model)
    for i, scale in enumerate(scales):
        with model.reft(scale, "bob"):
            assert torch.equal(mixed[i], run(model)[i])
    with model.reft(torch.tensor(scales), {"ada": 1.0, "bob": -1.0}):
        mixed = run(model)
    with model.reft(-2.0, {"bob": -1.0, "ada": 1.0}):
        torch.testing.assert_close(mixed[1], run(model)[1])  # another order of a sum
    with model.reft([1.0, 2.0], "ada"), pytest.raises(ValueError, match=r"scale has 2 numbers; .* here 3"):
        run(model)


def test_where_the_state_is_edited_in_a_copy():
    """Prefix and suffix have an intervention each there, and samples strengths of their own: none undoes another's edit."""
    torch.manual_seed(0)
    config = ReftConfig(r=3, positions="f2+l3", tied=False, component="block_input", init_weights="random")
    model = get_reft_model(make("llama"), config, "ada").eval()
    before = run(model)
    with model.reft(1.0):
        assert torch.equal(run(model), before)
    with model.reft([1.0, 2.0, -1.0]):
        mixed = run(model)
    for i, scale in enumerate((1.0, 2.0, -1.0)):
        model.set_scale(scale)
        assert torch.equal(mixed[i], run(model)[i])


def test_several_edit_the_same_state():
    """By hand at the first block; the order is nothing to it."""
    torch.manual_seed(0)
    model = get_reft_model(
        make("llama"), ReftConfig(r=3, positions="all", layers_to_transform=[0], init_weights="random"), "ada"
    )
    model.add_adapter("bob", ReftConfig(r=2, positions="all", layers_to_transform=[0], init_weights="random"))
    model.eval()
    block = model.get_base_model().model.layers[0]
    a, b = (block.reft.interventions(name)[0] for name in ("ada", "bob"))
    seen = []
    handle = block.register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
    with model.disable_adapter():
        run(model)
    with model.reft(0.5, {"ada": 1.0, "bob": -3.0}):
        run(model)
    handle.remove()
    plain, summed = seen
    with torch.no_grad():
        wanted = plain + 0.5 * (a(plain.clone()) - plain) - 1.5 * (b(plain.clone()) - plain)
    torch.testing.assert_close(summed, wanted, rtol=1e-5, atol=1e-6)


def test_generation_beams_and_gradients():
    torch.manual_seed(0)
    model = get_reft_model(make("llama"), ReftConfig(r=3, positions="f1+l2", init_weights="random"), "ada").eval()
    model.add_adapter("bob", ReftConfig(r=3, positions="all", init_weights="random"))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 2}, {"use_cache": False}):
        with model.reft([1.0, -1.0, 0.0], {"ada": 1.0, "bob": 0.5}):
            mixed = model.generate(**batch(), **options, **more)
        for i, scale in enumerate((1.0, -1.0, 0.0)):
            with model.reft(scale, {"ada": 1.0, "bob": 0.5}):
                alone = model.generate(**batch(), **options, **more)
            assert torch.equal(mixed[i], alone[i]), more
    model.train()
    labels = batch()["input_ids"].clone()
    labels[:, :5] = -100
    with model.reft(-1.0, "ada"):
        model(**batch(), labels=labels).loss.backward()
    assert all(edit.R.grad.abs().sum() > 0 for layer in model._shared.layers for edit in layer.interventions("ada"))


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"scale": [0.0, 0.0, 0.0]}, {"adapters": []}])
def test_training_that_edits_nothing_is_refused(model, settings):
    model.set_adapter("ada")
    model.train()
    try:
        with model.reft(**settings):
            with pytest.raises(ValueError, match=r"edits nothing: model.reft\(\) gives no adapter a strength"):
                model(**batch())
            run(model)  # which keeps no gradient
    finally:
        model.eval()


def test_numbers_of_numpys(model):
    with model.reft(np.float32(-0.5), {"bob": np.int64(1)}):
        wanted = run(model)
    with model.reft(np.full(3, -0.5), "bob"):
        assert torch.equal(run(model), wanted)


def test_a_compiled_forward_is_refused():
    model = get_reft_model(make("llama"), ReftConfig(r=3, positions="f1+l2", layers_to_transform=[0])).eval()
    compiled = torch.compile(model.get_base_model(), backend="eager")
    with torch.no_grad(), model.reft(-1.0), pytest.raises(RuntimeError, match=r"model.reft\(\) is for a model"):
        compiled(**batch())


@pytest.mark.parametrize(
    ("scale", "adapters", "said"),
    [
        (float("nan"), None, "scale is nan"),
        ("1", None, "scale is '1'"),
        ([], None, r"scale is \[\]"),
        ([1.0, None], None, r"scale is \[1.0, None\]"),
        (1.0, "cid", "adapters is 'cid'; the ReFT adapters of this model are ada, bob"),
        (1.0, {"ada": True}, "adapters gives 'ada' True"),
        (1.0, 3, "adapters is 3; the ReFT adapters of this model are ada, bob"),
        (1.0, [["ada"]], r"adapters is \[\['ada'\]\]; the ReFT adapters of this model are ada, bob"),
        (np.array([1.0, np.nan]), None, "scale is array"),
        pytest.param(10**400, None, "scale is 10+; it must be a finite number", id="beyond all floats"),
    ],
)
def test_what_is_refused(model, scale, adapters, said):
    with pytest.raises(ValueError, match=said):
        model.reft(scale, adapters)
