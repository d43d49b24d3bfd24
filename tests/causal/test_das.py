"""Causal models, the search for their variables, its kinds, files and sweeps."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fastreft import functional
from fastreft.causal import CausalModel, Das, Pairs, Subspace, collect, equality, interchange, load, sweep
from fastreft.causal.picture import heat_maps

SUM = CausalModel(
    {"a": [], "b": [], "sign": ["a", "b"], "c": [], "answer": ["sign", "c"]},
    {"sign": lambda a, b: a + b > 0, "answer": lambda sign, c: np.where(c > 0, sign, ~sign)},
    {"a": [-2, -1, 1, 2], "b": [-4, 0, 4], "c": [-1, 1]},
)


class Crafted(nn.Module):
    """Says whether (a + b > 0) is (c > 0): its second layer has the sign along a turned axis, and c along another."""

    def __init__(self, d: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.turn = nn.Linear(d, d, bias=False)
        self.seen = nn.Identity()
        nn.init.orthogonal_(self.turn.weight)

    def forward(self, x):
        sign, c = (x[:, 0] + x[:, 1]).tanh(), x[:, 2]
        noise = torch.stack([x[:, 0] * x[:, 1], x[:, 1], x[:, 0] * c, x[:, 1] ** 2], 1) / 4
        hidden = self.seen(self.turn(torch.cat([torch.stack([sign, c], 1), noise], 1)))
        back = hidden @ self.turn.weight
        score = 4 * back[:, 0] * back[:, 1]
        return torch.stack([-score, score], 1)


def encode(setting):
    return torch.from_numpy(np.stack([setting[name] for name in "abc"], 1)).float()


def test_a_causal_model_answers_what_would_be():
    base, source = ({"a": np.array([1]), "b": np.array([b]), "c": np.array([1])} for b in (0, -4))
    assert SUM.run(base)["answer"] and not SUM.run(source)["answer"]
    assert not SUM.interchange(base, {"sign": source})["answer"]
    assert SUM.interchange(base, {"c": source})["answer"]
    assert SUM.run(base, do={"sign": np.array([False])})["answer"] == [False]
    pairs = SUM.pairs(500, ["sign", "c"], seed=3)
    again = SUM.pairs(500, ["sign", "c"], seed=3)
    assert torch.equal(pairs.labels, again.labels) and 0.4 < float(pairs.labels.float().mean()) < 0.6
    for i in range(20):
        one = {name: {k: v[i : i + 1] for k, v in s.items()} for name, s in pairs.sources.items()}
        assert (
            int(SUM.interchange({k: v[i : i + 1] for k, v in pairs.base.items()}, one)["answer"][0]) == pairs.labels[i]
        )


@pytest.mark.parametrize(
    ("parents", "functions", "said"),
    [
        ({"a": [], "b": ["c"]}, {}, "'c', which is no variable"),
        ({"a": [], "b": ["a"]}, {}, "functions has none for 'b'"),
        ({"z": [], "b": ["z"]}, {"b": abs}, "values has none for the input 'z'"),
        ({"a": [], "b": ["c", "a"], "c": ["b"]}, {"b": max, "c": abs}, "parents has a loop among ['b', 'c']"),
        ({"a": [], "b": ["a"], "c": ["a"]}, {"b": abs, "c": abs}, "there must be one, the output"),
    ],
)
def test_causal_models_that_are_none(parents, functions, said):
    with pytest.raises(ValueError) as caught:
        CausalModel(parents, functions, {"a": [1]})
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["das", "boundless", "mask"])
def test_the_search_finds_a_variable(kind):
    """One dimension is enough for it; before, and for a wrong variable, IIA is no better than chance allows."""
    model = Crafted()
    train, test = (SUM.pairs(n, "sign", seed).encoded(encode) for n, seed in ((2048, 0), (512, 1)))
    torch.manual_seed(1)
    das = Das(model, "seen", Subspace(6, {"sign": 1 if kind == "das" else 4}, kind))
    before = das.iia(test)
    losses = das.train(
        train,
        steps=150,
        batch_size=128,
        lr=3e-2,
        mask_lr=5e-2,
        temperature=None if kind == "mask" else (3, 0.1),
        penalty=0.01,
    )
    assert das.iia(test) > 0.97 > 0.9 > before and losses[-1] < losses[0]
    assert torch.allclose(das.subspace.R @ das.subspace.R.T, torch.eye(das.subspace.r), atol=1e-5)
    if kind != "das":
        assert set(das.subspace.mask().tolist()) <= {0.0, 1.0}
    assert not any(m._forward_hooks for m in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_every_module_of_the_model_keeps_its_own_mode():
    model, pairs = Crafted().train(), SUM.pairs(32, "sign", 0).encoded(encode)
    model.seen.eval()
    das = Das(model, "seen", Subspace(6, {"sign": 1}))
    das.train(pairs, steps=1)
    das.iia(pairs)
    assert model.training and model.turn.training and not model.seen.training


def test_the_search_is_the_same_again_and_pca_and_given_directions_are_not_trained():
    model, pairs = Crafted(), SUM.pairs(256, "sign", 0).encoded(encode)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        das = Das(model, "seen", Subspace(6, {"sign": 1}))
        runs.append((das.train(pairs, epochs=1), das.subspace.R.detach().clone()))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    states = collect(model, pairs.base, {"seen": None})["seen"].values
    pca = Subspace.pca(states, {"sign": 2})
    centred = states.flatten(0, 1) - states.flatten(0, 1).mean(0)
    spread = [float((centred @ direction).std()) for direction in pca.R]
    assert spread[0] >= spread[1] >= max(float((centred @ d).std()) for d in torch.eye(6)) * 0.5
    right = Das(model, "seen", Subspace.of(model.turn.weight.T[:1].detach(), {"sign": 1}))
    assert right.iia(pairs) == 1.0
    for fixed in (pca, right.subspace):
        with pytest.raises(ValueError, match="nothing to train"):
            Das(model, "seen", fixed).train(pairs)


def test_files(tmp_path):
    model, pairs = Crafted(), SUM.pairs(64, ["sign", "c"], 0).encoded(encode)
    das = Das(model, "seen", Subspace(6, {"sign": 2, "c": 1}, "mask"))
    das.train(pairs, steps=3)
    das.save(tmp_path / "found.safetensors")
    again = Das.load(tmp_path / "found.safetensors", model)
    assert (
        torch.equal(again.predictions(pairs), das.predictions(pairs))
        and again.subspace.variables == das.subspace.variables
    )
    assert torch.equal(again.subspace.R, das.subspace.R)
    with pytest.raises(ValueError, match="at is a Tensor, which no file can keep"):
        Das(model, "seen", das.subspace, torch.zeros(1, 1)).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="has no module 'seen'"):
        Das.load(tmp_path / "found.safetensors", nn.Sequential(nn.Linear(6, 6)))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a file of safetensors"):
        load(tmp_path / "bad.safetensors")
    data = (tmp_path / "found.safetensors").read_bytes().replace(b'"kind":"mask"', b'"kind":"mist"')
    (tmp_path / "odd.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="does not fit together: kind is 'mist'"):
        load(tmp_path / "odd.safetensors")


def test_a_sweep_goes_on_where_it_was(tmp_path):
    model, train, test = Crafted(), *(SUM.pairs(128, "sign", seed).encoded(encode) for seed in (0, 1))
    made = []

    def make(values):
        assert values.shape == (128, 1, 6)
        made.append(values)
        return Subspace(6, {"sign": 1})

    def run(places, **more):
        asked = {"steps": 5, "batch_size": 32} | more
        return list(sweep(model, train, test, places, {"only": None}, make, tmp_path, settings={"of": "sum"}, **asked))

    first = run(["seen"])
    with open(tmp_path / "cells.jsonl", "a") as file:
        file.write('{"place": "tu')  # a kill while it was written
    both = run(["seen", "turn"])
    assert both[0] == first[0] and [cell["place"] for cell in both] == ["seen", "turn"] and len(made) == 2
    assert [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()] == both
    assert Das.load(tmp_path / "subspaces" / "turn.only.safetensors", model).iia(test) == both[1]["iia"]
    with pytest.raises(ValueError, match="holds a sweep with steps 5, and this one has 6"):
        run(["seen"], steps=6)
    pytest.importorskip("matplotlib")
    heat_maps({"one": both, "two": both}, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_hierarchical_equality_by_hand():
    """The causal model's counts, and a network of that shape under an exchange of all of a layer: what it says of the
    source."""
    causal = equality.causal_model()
    setting = causal.run(causal.sample(4000, 0))
    assert all(0.45 < float(np.mean(setting[name])) < 0.55 for name in ("WX", "YZ", "O"))
    network = equality.Network()
    base, source = (equality.encode(causal.sample(5, seed)) for seed in (1, 2))
    with interchange(network, {"h.1": (None, source)}, Subspace(16, 16)), torch.no_grad():
        torch.testing.assert_close(network(base), network(source))


def test_pairs_with_positions_of_their_own():
    """An example's variable lies at its own place: of the base by ``at``, of the source by ``source_at``."""

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Identity()

        def forward(self, x):
            return self.block(x).sum(1)[:, :2]

    torch.manual_seed(0)
    base, source = torch.randn(3, 4, 6), torch.randn(3, 5, 6)
    at, source_at = torch.tensor([[0], [3], [1]]), torch.tensor([[4], [0], [2]])
    changed = base.clone()
    changed[torch.arange(3), at[:, 0]] = source[torch.arange(3), source_at[:, 0]]
    labels = changed.sum(1)[:, :2].argmax(1)
    pairs = Pairs(base, {"": source}, labels, at, {"": source_at})
    das = Das(Sequence(), "block", Subspace(6, 6))
    assert das.iia(pairs, batch_size=2) == 1.0
    named = pairs._replace(sources={"x": source}, source_at={"x": source_at})
    assert das.iia(named, batch_size=2) == 1.0, "a subspace of one variable need not name it"
    with pytest.raises(ValueError, match="pairs have sources for x, y"):
        das.iia(pairs._replace(sources={"x": source, "y": source}))


def test_boundaries_and_masks_are_what_the_formulas_say():
    boundless = Subspace(8, {"a": 2, "b": 3}, "boundless").train()
    boundless.temperature = 0.7
    with torch.no_grad():
        boundless.boundary.copy_(torch.tensor([0.5, 0.9]))
    index = torch.arange(3)
    expected = torch.cat([torch.sigmoid((1 - index[:2] - 0.5) / 0.7), torch.sigmoid((2.7 - index - 0.5) / 0.7)])
    torch.testing.assert_close(boundless.mask(), expected)
    assert boundless.eval().mask().tolist() == [1, 0, 1, 1, 1]
    assert all(a >= b for a, b in pairwise(boundless.train().mask()[2:].tolist()))
    R, h, s = boundless.R, torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(boundless(h, s, "b"), functional.interchange(h, s, R[2:], boundless.mask()[2:]))
    for bad, said in (
        ((8, 9), "low_rank_dimension is 9"),
        ((8, {"a": 0}), "dims is"),
        ((8, 2, "soft"), "kind is 'soft'"),
    ):
        with pytest.raises(ValueError, match=said):
            Subspace(*bad)
