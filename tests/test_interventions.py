"""The modules against pyreft's own outputs and gradients, and what a module promises."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
import torch
from common import assert_as_good

from fastreft import functional as F
from fastreft import interventions as I
from fastreft import reference

pytestmark = pytest.mark.usefixtures("everything_on")

CLASSES = {name: cls for name, cls in vars(I).items() if name.endswith("Intervention") and name != "Intervention"}


def load(case, module):
    """A pyreft case's raw parameters into ours; returns our name -> pyreft's name and transform."""
    raw, R = case["raw_state_dict"], case.get("R")
    source = {}
    if hasattr(module, "R"):
        source["R"] = R.T
    if "proj_layer.weight" in raw:
        source["P"] = raw["proj_layer.weight"]
    if "proj_layer.bias" in raw:
        source["c"] = raw["proj_layer.bias"]
    if "learned_source.weight" in raw:
        source["W"], source["b"] = raw["learned_source.weight"], raw["learned_source.bias"]
    elif "learned_source" in raw:
        source["b"] = raw["learned_source"]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            assert parameter.shape == source[name].shape
            parameter.copy_(source[name])
    return source


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_equal_to_pyreft(shared, name):
    """Outputs and every gradient of every oracle case, to the tolerance rule; pyreft's own values are the plain torch."""
    cases = torch.load(
        shared / "oracles" / "interventions" / f"{name.removesuffix('Intervention')}.pt",
        weights_only=True,
        map_location=torch.get_default_device(),
    )
    assert cases
    for case in cases:
        module = CLASSES[name](
            embed_dim=case["d"],
            low_rank_dimension=case["r"],
            dtype=getattr(torch, case["dtype"].removeprefix("torch.")),
            act_fn=case["act_fn"],
            add_bias=bool(case["add_bias"]),
        )
        load(case, module)
        exact = copy.deepcopy(module).double()
        h, g = case["h"], case["g"]

        def run(m, h, g):
            x = h.detach().clone().requires_grad_()
            out = m(x)
            parameters = dict(m.named_parameters())
            grads = torch.autograd.grad(out, [x, *parameters.values()], g, allow_unused=True)
            return out.detach(), grads[0], dict(zip(parameters, grads[1:], strict=True))

        out, dh, grads = run(module, h, g)
        out64, dh64, grads64 = run(exact, h.double(), g.double())
        assert out.dtype == h.dtype
        assert_as_good([out], [case["out"]], [out64])
        assert_as_good([dh], [case["grad_h"]], [dh64])
        theirs = case.get("grads_effective")
        if theirs is None:
            continue  # bf16: pyreft's parameters are rounded apart, only outputs and dh compare
        keys = {"R": "R", "W": "W", "P": "proj", "b": "b", "c": "pb"}
        names = [n for n in grads if grads[n] is not None and theirs.get(keys[n]) is not None]
        want = [theirs[keys[n]].T if n == "R" else theirs[keys[n]] for n in names]
        assert len(names) >= 2
        assert_as_good([grads[n] for n in names], want, [grads64[n] for n in names])


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_rows_and_dense_agree(name):
    torch.manual_seed(0)
    module = CLASSES[name](embed_dim=24, low_rank_dimension=3, act_fn="relu", add_bias=True)
    base = torch.randn(2, 5, 24)
    rows = torch.tensor([0, 7, -1])
    with torch.no_grad():
        dense, listed = module(base), base.clone()
        assert module(listed, rows=rows) is listed
    want = base.clone().view(-1, 24)
    want[[0, 7]] = dense.view(-1, 24)[[0, 7]]
    assert torch.equal(listed.view(-1, 24), want)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_dtypes_and_init(name):
    """W, b, P in the dtype asked for, R never below fp32 and orthonormal; the edit is not the identity at the start."""
    torch.manual_seed(0)
    for dtype in (None, torch.bfloat16, torch.float64):
        module = CLASSES[name](embed_dim=32, low_rank_dimension=4, dtype=dtype)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        for key, parameter in module.named_parameters():
            held_wide = key == "R" or name in ("ConsreftIntervention", "LobireftIntervention")
            assert parameter.dtype == (wide if held_wide else dtype or torch.float32)
        if hasattr(module, "R"):
            torch.testing.assert_close(module.R @ module.R.T, torch.eye(4, dtype=wide), atol=1e-6, rtol=0)
        h = torch.randn(3, 32, dtype=torch.bfloat16)
        assert module(h).dtype == torch.bfloat16
        assert not torch.equal(module(h), h)


def test_building_a_wide_one_takes_no_d_by_d():
    """Plain leaves of r x d: at d = 4096 nothing of 4096 x 4096 is held, and building is a matter of milliseconds."""
    module = I.LoreftIntervention(embed_dim=4096, low_rank_dimension=4)
    held = sum(t.numel() for t in (*module.parameters(), *module.buffers()))
    assert held == 2 * 4 * 4096 + 4
    assert all(p.is_leaf for p in module.parameters())
    start = time.perf_counter()
    for _ in range(5):
        I.LoreftIntervention(embed_dim=4096, low_rank_dimension=4)
    print(f"{(time.perf_counter() - start) / 5 * 1e3:.1f} ms to build one")


def test_dropout_is_on_the_whole_output_and_follows_train_and_eval():
    torch.manual_seed(0)
    module = I.LoreftIntervention(embed_dim=64, low_rank_dimension=2, dropout=0.5)
    h = torch.randn(40, 64)
    dropped = module(h)
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * reference.edit(h, *module.weights())[kept])
    rows = torch.tensor([1, 5, -1, 5])
    listed = module(h.clone(), rows=rows)
    assert torch.equal(listed[[0, 2]], h[[0, 2]])
    assert (listed[[1, 5]] == 0).any()
    module.eval()
    assert torch.equal(module(h), F.loreft(h, module.R, module.W, module.b))


def test_parametric_activation_trains():
    module = I.LoreftIntervention(embed_dim=16, low_rank_dimension=3, act_fn="prelu")
    h = torch.randn(5, 16)
    (module(h, rows=None).sum() + module(h.clone(), rows=torch.tensor([2])).sum()).backward()
    assert module.act.weight.grad.abs().sum() > 0
    assert module.R.grad.abs().sum() > 0


def test_pyvene_calling_convention_copies_and_errors():
    module = I.DireftIntervention(embed_dim=16, low_rank_dimension=3, keep_last_dim=True, layer=7)
    h = torch.randn(2, 3, 16)
    assert torch.equal(module(h, None, None), module(h))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(h), module(h))
        assert id(twin.R) in I.orthonormal_parameters()
    for make, words in (
        (
            lambda: I.LoreftIntervention(embed_dim=4, low_rank_dimension=5),
            "low_rank_dimension is 5; it must be between 1 and embed_dim",
        ),
        (lambda: I.LoreftIntervention(embed_dim=4, low_rank_dimension=2, dropout=1.0), "dropout is 1.0"),
        (lambda: I.LoreftIntervention(embed_dim=4, low_rank_dimension=2, act_fn="nope"), "act_fn 'nope'"),
        (lambda: I.LoreftIntervention(embed_dim=4, low_rank_dimension=2, dtype=torch.int8), "dtype is torch.int8"),
        (lambda: module(h, subspaces=[[0]]), "subspaces has 1 entries; it must have one a sample, here 2"),
        (lambda: I.Intervention(embed_dim=4, low_rank_dimension=2), "abstract"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            make()
