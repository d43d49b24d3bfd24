"""Edits beyond the paper's six: those that ship, and a user's own, through a model's whole life."""

from __future__ import annotations

import pytest
import tiny
import torch
from common import DEVICES
from torch import nn

import fastreft
from fastreft import ReftConfig, get_reft_model
from fastreft.interventions import Intervention
from fastreft.kinds import KINDS
from fastreft.ops import names
from fastreft.serving import adapter

D = 12
WIDTH = tiny.WIDTH


def gates(p, h):
    """Of csreft with groups [0, 1] and [2], a gate a row."""
    hidden = torch.relu(h / h.norm(dim=-1, keepdim=True) @ p["F"].T + p["f"])
    return torch.sigmoid(hidden @ p["G"].T + p["e"])[..., [0, 0, 1]]


# By hand, from their papers: what each makes of rows h, of parameters by name.
FORMULAS = {
    "bias": lambda p, h: h + p["v"],
    "red": lambda p, h: p["s"] * h + p["v"],
    "csreft": lambda p, h: h + (gates(p, h) * (h @ (p["W"] - p["R"]).T + p["b"])) @ p["R"],
    "halfway": lambda p, h: h + torch.tanh(h @ p["A"].T) @ p["A"],
    "turned": lambda p, h: h + (h @ p["W"].T) @ p["R"],
}


def no_parameters(self, dtype, add_bias):
    """A formula without parameters."""


@pytest.fixture(scope="module", autouse=True)
def own():
    """Two of a user's: a formula, and an edit of the kernels' form with an orthonormal R."""

    @fastreft.register_intervention("halfway")
    class Halfway(fastreft.TorchIntervention):
        def build(self, dtype, add_bias):
            self.A = self._matrix(dtype)

        def formula(self, h):
            return h + torch.tanh(h @ self.A.T) @ self.A

    @fastreft.register_intervention("turned")
    class Turned(Intervention):
        def build(self, dtype, add_bias):
            self.R, self.W = self._matrix(dtype), self._matrix(dtype)

        def weights(self):
            return self.R, self.W, None, None, None

    @fastreft.register_intervention("free")
    class Free(Turned):
        orthonormal = False

    @fastreft.register_intervention("without_R")
    class WithoutR(Intervention):
        def build(self, dtype, add_bias):
            self.u, self.b = self._matrix(dtype), self._vector(dtype)

        def weights(self):
            return self.u, None, None, self.b, None

    @fastreft.register_intervention("in_place")
    class InPlace(fastreft.TorchIntervention):
        def build(self, dtype, add_bias):
            self.s = self._vector(dtype)

        def formula(self, h):
            return h.mul_(1 + self.s[0])

    @fastreft.register_intervention("net")
    class Net(fastreft.TorchIntervention):
        def build(self, dtype, add_bias):
            self.net = nn.Sequential(nn.Linear(self.embed_dim, self.embed_dim, dtype=dtype), nn.Tanh())

        def formula(self, h):
            return h + self.net(h)

    yield
    for name in ("halfway", "turned", "free", "without_R", "in_place", "net"):
        names.WHOLE.discard(name)
        del KINDS[name], names.OWN[name]


def moved(module: nn.Module) -> nn.Module:
    """With numbers that are no start's, R aside."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[2] in ("v", "s"):
                parameter.copy_(torch.randn_like(parameter))
    return module


def made(kind: str, **settings) -> Intervention:
    torch.manual_seed(0)
    return moved(KINDS[kind](embed_dim=D, low_rank_dimension=3, **settings))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", FORMULAS)
def test_rows_and_all_of_them_are_the_formula(kind, device):
    m = made(kind, dtype=torch.float64).to(device)
    h = torch.randn(2, 5, D, dtype=torch.float64, device=device)
    wanted = FORMULAS[kind](dict(m.named_parameters()), h)
    torch.testing.assert_close(m(h), wanted)
    rows = torch.tensor([7, -1, 0, 3], device=device)
    some = m(h.clone(), rows=rows)
    listed = torch.zeros(10, 1, dtype=torch.bool, device=device)
    listed[[7, 0, 3]] = True
    torch.testing.assert_close(some, torch.where(listed.view(2, 5, 1), wanted, h))
    m.scale = -0.5
    torch.testing.assert_close(m(h), h - 0.5 * (wanted - h))


@pytest.mark.parametrize("kind", FORMULAS)
def test_gradients_are_those_of_the_formula(kind):
    m = made(kind, dtype=torch.float64)
    h = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    rows, weight = torch.tensor([5, -1, 2]), torch.randn(2, 4, D, dtype=torch.float64)
    inputs = [h, *m.parameters()]
    got = torch.autograd.grad((m(h.clone(), rows=rows) * weight).sum(), inputs)
    flat = h.reshape(-1, D)
    edited = flat.clone().index_copy(
        0, rows[rows >= 0], FORMULAS[kind](dict(m.named_parameters()), flat[rows[rows >= 0]])
    )
    wanted = torch.autograd.grad((edited.view_as(h) * weight).sum(), inputs)
    for own, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(own, right)


@pytest.mark.parametrize("kind", ["bias", "red", "csreft"])
def test_the_start_changes_no_bit(kind):
    h = torch.randn(3, D).bfloat16()
    assert torch.equal(KINDS[kind](embed_dim=D, low_rank_dimension=4, init_weights="identity")(h), h)


@pytest.mark.parametrize("kind", FORMULAS)
def test_bf16_is_rounded_once(kind):
    m, h = made(kind), torch.randn(6, D).bfloat16()
    wanted = FORMULAS[kind](dict(m.named_parameters()), h.float())
    assert m(h).dtype is torch.bfloat16
    torch.testing.assert_close(m(h).float(), wanted, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("kind", FORMULAS)
def test_trained_saved_loaded_mixed_and_steered(kind, tmp_path):
    """A life: the loss falls, the file holds it all, a batch mixes it with LoReFT, and half of it is half of it."""
    config = ReftConfig(task_type="CAUSAL_LM", intervention_type=kind, r=3, positions="f2+l2", init_weights="random")
    model = get_reft_model(tiny.make("llama"), config)
    batch = tiny.batch("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :4] = -100
    optimizer = fastreft.ReftAdamW(fastreft.param_groups(model, lr=3e-2))
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.02
    model.eval()
    with torch.no_grad():
        alone = model(**batch).logits
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(tiny.make("llama"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, alone)
        bare = tiny.make("llama")(**batch).logits
        with loaded.reft(scale=0.0):
            assert torch.equal(loaded(**batch).logits, bare)
    loaded.add_adapter("other", ReftConfig(r=2, positions="l1", init_weights="random"))
    loaded.set_adapter("other")
    with torch.no_grad():
        others = loaded(**batch).logits
        mixed = loaded(**batch, adapter_names=["default", "other", "__base__"]).logits
    wanted = torch.stack([alone[0], others[1], bare[2]])
    torch.testing.assert_close(mixed, wanted)
    out = loaded.generate(**tiny.batch("left"), max_new_tokens=3, adapter_names=["default", "other", "__base__"])
    assert out.shape[1] == 12


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_pool_takes_what_the_kernels_know_and_refuses_the_rest(kind, tmp_path):
    model = moved(get_reft_model(tiny.make("llama"), ReftConfig(intervention_type=kind, r=3, init_weights="random")))
    model.save_pretrained(tmp_path)
    if kind in ("red", "halfway", "csreft"):
        with pytest.raises(ValueError, match=f"is a {kind}, a formula in torch that no kernel knows"):
            adapter.read(tmp_path, tiny.LAYERS, WIDTH)
    else:
        found = adapter.read(tmp_path, tiny.LAYERS, WIDTH)
        assert found.vectors == (1 if kind == "bias" else 3)
        if kind == "bias":
            torch.testing.assert_close(
                found.U[1, 0], model.get_base_model().model.layers[1].reft.reft_edit["default"].v
            )


def test_an_edit_of_ones_own_that_is_compiled():
    model = moved(get_reft_model(tiny.make("llama"), ReftConfig(intervention_type="red", r=1, positions="l2")))
    batch = tiny.batch("right")
    with torch.no_grad():
        wanted = model(**batch).logits
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(**batch).logits, wanted)


def test_orthonormal_rows_of_ones_own_stay_so():
    model = get_reft_model(tiny.make("llama"), ReftConfig(intervention_type="turned", r=3, positions="all"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**tiny.batch()).logits.square().sum().backward()
    optimizer.step()
    R = model.get_base_model().model.layers[0].reft.reft_edit["default"].R.detach()
    torch.testing.assert_close(R @ R.T, torch.eye(3))


def test_an_edit_without_R_trains_beside_any_optimizer():
    model = get_reft_model(tiny.make("llama"), ReftConfig(intervention_type="without_R", r=2, positions="all"))
    edit = model.get_base_model().model.layers[0].reft.reft_edit["default"]
    assert not edit.orthonormal
    optimizer = fastreft.ReftAdamW(fastreft.param_groups(model, lr=0.1))
    before = edit.b.detach().clone()
    model(**tiny.batch()).logits.square().sum().backward()
    optimizer.step()
    assert not torch.equal(edit.b, before)
    other = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(other.parameters())
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_an_R_that_is_not_to_be_orthonormal_is_free(tmp_path):
    from peft import PeftModel

    model = get_reft_model(tiny.make("llama"), ReftConfig(intervention_type="free", r=3, positions="all"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**tiny.batch()).logits.square().sum().backward()
    optimizer.step()
    R = model.get_base_model().model.layers[0].reft.reft_edit["default"].R.detach()
    assert (R @ R.T - torch.eye(3)).abs().max() > 0.5
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    assert torch.equal(again.get_base_model().model.layers[0].reft.reft_edit["default"].R, R)


@pytest.mark.parametrize("kind", ["csreft", "halfway", "red", "net"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_formula_of_a_model_that_was_cast(kind, dtype):
    """Parameters of another dtype than the rows: the edit of rows of fp32, or of fp64, with them as they are."""
    m = made(kind)
    rows = torch.randn(5, D, dtype=torch.float64)
    if dtype is torch.bfloat16:
        m, rows = m.to(dtype), rows.to(dtype)
    got = m(rows)
    wide = made(kind).to(dtype).to(torch.float32 if dtype is torch.bfloat16 else torch.float64)
    wanted = wide.formula(rows.to(next(wide.parameters()).dtype))
    assert got.dtype is dtype
    if dtype is torch.bfloat16:
        assert torch.equal(got, wanted.to(dtype))
    else:
        wide = made(kind).double()
        torch.testing.assert_close(got, wide.formula(rows), rtol=1e-12, atol=1e-12)
    got.sum().backward()
    wide.formula(rows.to(next(wide.parameters()).dtype)).sum().backward()
    for own, right in zip(m.parameters(), wide.parameters(), strict=True):
        assert own.grad.dtype is own.dtype
        torch.testing.assert_close(own.grad.double(), right.grad.double(), rtol=2**-6, atol=2**-6)


def test_a_formula_that_works_in_place_has_its_strengths():
    m = made("in_place")
    h, s = torch.randn(4, D), m.s[0].detach()
    torch.testing.assert_close(m.edit(h.clone(), None, "new", scale=-2.0), (1 - 2 * s) * h)


def test_csreft_routes_by_the_groups_of_its_configuration():
    config = ReftConfig(intervention_type="csreft", r=5, subspaces={"a": [0, 4], "b": [1]}, positions="all")
    model = get_reft_model(tiny.make("llama"), config)
    edit = model.get_base_model().model.layers[0].reft.reft_edit["default"]
    assert edit.group_of.tolist() == [0, 1, 2, 2, 0]  # 2: of none
    assert edit.G.shape == (2, 16)
    model(**tiny.batch()).logits.square().sum().backward()  # no choice is asked for
    assert edit.b.grad[[0, 1, 4]].abs().min() > 0
    assert edit.b.grad[[2, 3]].abs().max() == 0
    with pytest.raises(ValueError, match="of the edits that have one; csreft edits whole"):
        model(**tiny.batch(), subspaces=[[0], [0], [0]])


def odd(**methods):
    return type("Odd", (fastreft.TorchIntervention,), methods)(D)


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (lambda: fastreft.register_intervention("loreft"), "name is 'loreft'; it must be a word"),
        (lambda: fastreft.register_intervention("no name"), "name is 'no name'; it must be a word"),
        (lambda: fastreft.register_intervention("mine")(nn.Linear), "is no subclass of fastreft.TorchIntervention"),
        (lambda: ReftConfig(intervention_type="unheard"), "or one of your own, once the module has been imported"),
        (lambda: ReftConfig(intervention_type="red", act_fn="relu"), "act_fn is 'relu', and red has no activation"),
        (lambda: ReftConfig(intervention_type="bias", subspaces=[[0]]), "groups of R's rows, and bias has none"),
        (lambda: ReftConfig(intervention_type="halfway", subspaces=[[0]]), "groups of R's rows, and halfway has none"),
        (lambda: odd(formula=lambda self, h: None, build=no_parameters)(torch.ones(3, D)),
         r"Odd.formula gives NoneType; it must be as its rows are, \(3, 12\)"),
        (lambda: ReftConfig(intervention_type="halfway", init_weights="identity"), "edits whatever its weights are"),
        (lambda: fastreft.TorchIntervention(4), "is abstract"),
        (lambda: made("red")(torch.ones(2, D), None, [[0], [0]]), "subspaces are rows of R, of the edits that have one"),
        (lambda: odd(formula=lambda self, h: h[:1], build=no_parameters)(torch.ones(3, D)),
         r"Odd.formula gives \(1, 12\); it must be as its rows are, \(3, 12\)"),
        (lambda: odd(build=KINDS["loreft"].build), "Odd: R is the name of"),
        (lambda: fastreft.pyreft.format.kind_of(made("red")), "is not one of the six"),
    ],
)  # fmt: skip
def test_refusals(do, said):
    with pytest.raises((ValueError, TypeError), match=said):
        do()


def test_a_name_that_is_a_tensors_is_no_adapters():
    with pytest.raises(ValueError, match="adapter_name is 'v'"):
        get_reft_model(tiny.make("llama"), ReftConfig(intervention_type="bias"), adapter_name="v")
