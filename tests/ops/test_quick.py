"""csrc/quick/, the calls past torch's dispatcher: that they are taken, give the same bits, and stand back where they must."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from common import DEVICES
from family import DTYPES, FAMILY, gradients, weights
from tiny import batch, blocks, make
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fastreft import LoreftIntervention, ReftAdamW, ReftConfig, get_reft_model
from fastreft import functional as F
from fastreft.ops import native

quick = native.quick
pytestmark = pytest.mark.skipif(quick is native.Elsewhere, reason=str(native.build_info().get("calls")))
ROWS = torch.tensor([4, -1, 0, 4, 2])


def dispatched(call, monkeypatch):
    """What a call gives without csrc/quick/."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "quick", native.Elsewhere)
        return call()


def taken(monkeypatch) -> list[str]:
    """The names of the quick calls from here on that did not stand back."""
    names: list[str] = []

    class Recording:
        def __getattr__(self, name):
            def call(*args):
                found = getattr(quick, name)(*args)
                if found is not NotImplemented:
                    names.append(name)
                return found

            return call

    monkeypatch.setattr(native, "quick", Recording())
    return names


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("act", [None, "gelu"])
def test_the_same_bits_as_through_the_dispatcher(method, dtype, wide, act, device, monkeypatch):
    torch.manual_seed(0)
    ws, h, g = weights(method, 24, 3, wide, device), torch.randn(6, 24).to(device, dtype), torch.randn(6, 24)
    extra = {} if act is None or method in ("consreft", "lobireft") else {"act_fn": act}
    rows, g = ROWS.to(device), g.to(device, dtype)

    def both():
        with torch.no_grad():
            plain = getattr(F, f"{method}_rows_")(h.clone(), rows, *ws, **extra)
        return [plain, *gradients(lambda h, *ws: getattr(F, f"{method}_rows_")(h * 1, rows, *ws, **extra), h, ws, g)]

    for ours, theirs in zip(both(), dispatched(both, monkeypatch), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_every_step_of_training_takes_it(monkeypatch):
    model = get_reft_model(make("llama"), ReftConfig(r=2, positions="f1+l2", task_type="CAUSAL_LM")).train()
    optimizer = ReftAdamW(model.parameters(), lr=1e-3)
    names = taken(monkeypatch)
    model(**batch(), labels=batch()["input_ids"].masked_fill(torch.arange(9) < 8, -100)).loss.backward()
    optimizer.step()
    layers = len(blocks(model))
    assert names == ["hidden_sample", "prompt_rows", *["edit_rows_"] * layers, "step_"]


def test_parameters_and_moments_are_those_of_the_dispatched_step(monkeypatch):
    def trained():
        torch.manual_seed(1)
        m = LoreftIntervention(embed_dim=12, low_rank_dimension=2)
        optimizer = ReftAdamW(m.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            m(torch.randn(5, 12)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state_dict()["state"]
        return [*m.parameters(), *(state[i][name] for i in range(3) for name in ("exp_avg", "exp_avg_sq"))]

    assert all(torch.equal(a, b) for a, b in zip(trained(), dispatched(trained, monkeypatch), strict=True))


class Listening(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_it_stands_back_where_somebody_looks_at_the_calls(monkeypatch):
    ws, h = weights("loreft", 8, 2, torch.float32), torch.randn(5, 8)
    exact = F.loreft_rows_(h.clone(), ROWS, *ws)
    names = taken(monkeypatch)
    with Listening() as mode:
        assert torch.equal(F.loreft_rows_(h.clone(), ROWS, *ws), exact)
    assert any("edit_rows_" in name for name in mode.heard)
    with torch.device("cpu"):  # a mode of torch functions
        assert torch.equal(F.loreft_rows_(h.clone(), ROWS, *ws), exact)
    assert torch.equal(F.loreft_rows_(h.clone().as_subclass(Subclass), ROWS, *ws), exact)
    assert torch.equal(F.loreft_rows_(h.clone(), ROWS.int(), *ws), exact)
    each = torch.func.vmap(lambda h: F.loreft(h, *ws))(h)  # transforms know torch's own ops alone
    torch.testing.assert_close(each, F.loreft(h, *ws))
    traced = torch.jit.trace(lambda h: F.loreft_rows_(h * 1, ROWS, *ws), (h,), check_trace=False)
    assert torch.equal(traced(h), exact)
    assert names == []
    assert torch.equal(F.loreft_rows_(h.clone(), ROWS, *ws), exact)
    assert names == ["edit_rows_"]


def test_a_leaf_and_a_view_of_one_are_refused_in_place():
    ws = weights("loreft", 8, 2, torch.float32)
    for leaf in (torch.randn(5, 8, requires_grad=True), torch.randn(10, 4, requires_grad=True).view(5, 8)):
        with pytest.raises(RuntimeError, match="leaf"):
            F.loreft_rows_(leaf, ROWS, *ws)
    several = (torch.randn(5, 16, requires_grad=True) * 1).chunk(2, 1)[0]  # of which autograd tells no one apart
    with pytest.raises(RuntimeError, match="view"):
        F.loreft_rows_(several, ROWS, *ws)


@pytest.mark.usefixtures("calls")
def test_a_view_is_edited_with_its_base():
    ws = weights("loreft", 8, 2, torch.float64)

    def edited(x):
        base = x * 1
        F.loreft_rows_(base.view(6, 8), ROWS, *ws)
        return base

    x = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(edited, x)


@pytest.mark.usefixtures("calls")
def test_what_is_changed_counts_as_changed():
    """Versions: what autograd has saved and an edit or a step then changes is an error, as with torch's own in-place ops."""
    m = LoreftIntervention(embed_dim=8, low_rank_dimension=2)
    x = torch.randn(5, 8, requires_grad=True)
    y = x * 1
    squares = y.square()
    with torch.no_grad():
        m(y, rows=ROWS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()

    loss = m(x * 1, rows=ROWS).square().sum()
    loss.backward(retain_graph=True)
    ReftAdamW(m.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = m(x * 1, rows=ROWS).square().sum()
    F.retract_([m.R])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # whose tensors count nothing
        m(torch.randn(5, 8), rows=ROWS)


@pytest.mark.usefixtures("calls")
def test_a_graph_is_freed_and_saved_tensors_can_be_packed():
    m = LoreftIntervention(embed_dim=8, low_rank_dimension=2)
    x, packed = torch.randn(5, 8, requires_grad=True), []
    exact = torch.autograd.grad(m(x * 1, rows=ROWS).square().sum(), [x, *m.parameters()])
    with saved_tensors_hooks(lambda t: (packed.append(tuple(t.shape)), t)[1], lambda t: t):
        y = m(x * 1, rows=ROWS)
    assert (5, 8) in packed  # the five rows before the edit
    with save_on_cpu():
        y = m(x * 1, rows=ROWS).square().sum()
    got = torch.autograd.grad(y, [x, *m.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x)


@pytest.mark.usefixtures("calls")
def test_a_gradient_that_nobody_holds_is_not_copied():
    """It goes on with the edited rows changed; held by another, it is left alone and a copy goes on."""
    m = LoreftIntervention(embed_dim=8, low_rank_dimension=2)

    def copies(held):
        y = m(torch.randn(5, 8, requires_grad=True) * 1, rows=ROWS)
        if held is not None:
            y.register_hook(held.append)
        loss = (y * 2).square().sum()
        with torch.profiler.profile() as profile:
            loss.backward()
        return sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")

    assert copies([]) == copies(None) + 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd(backend):
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()
    compiled_autograd.reset()  # else what one backend compiled is what the other one runs
    made, counted = (
        make("llama", num_hidden_layers=1),
        [],
    )  # one block, as each node of its backward takes the compiler time
    model = get_reft_model(made, ReftConfig(r=2, positions="f1+l2", task_type="CAUSAL_LM")).train()
    labels = batch()["input_ids"].masked_fill(torch.arange(9) < 8, -100)

    def learned(backward):
        model.zero_grad()
        backward(model(**batch(), labels=labels).loss)
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    def compiled(loss):
        def compile_with(graph, given):
            counted.append(graph)
            return torch._dynamo.lookup_backend(backend)(graph, given)

        with compiled_autograd._enable(torch.compile(backend=compile_with)):
            loss.backward()

    for got, exact in zip(learned(compiled), learned(lambda loss: loss.backward()), strict=True):
        torch.testing.assert_close(got, exact)
    assert counted


def test_a_profile_names_the_edit():
    m, h = LoreftIntervention(embed_dim=8, low_rank_dimension=2), torch.randn(5, 8)
    with torch.profiler.profile() as profile:
        m(h * 1, rows=ROWS).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "fastreft::edit_rows_" in names
    assert any("fastreft::EditRows" in name for name in names)


def test_threads_do_not_disturb_each_other():
    model = get_reft_model(make("llama"), ReftConfig(r=2, positions="f1+l2", task_type="CAUSAL_LM")).eval()
    sides = ("left", "right")
    exact = {side: model(**batch(side)).logits for side in sides}
    found: dict[str, list[torch.Tensor]] = {side: [] for side in sides}
    inputs = {side: batch(side) for side in sides}

    def run(side):
        for _ in range(20):
            found[side].append(model(**inputs[side]).logits)

    threads = [threading.Thread(target=run, args=(side,)) for side in sides]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for side in sides:
        assert len(found[side]) == 20 and all(torch.equal(logits, exact[side]) for logits in found[side])


def test_a_copy_of_the_model_edits_with_its_own():
    model = get_reft_model(make("llama"), ReftConfig(r=2, positions="f1+l2", task_type="CAUSAL_LM")).eval()
    before = model(**batch()).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for block in blocks(twin):
            block.reft.reft_edit["default"].b.add_(1)
    assert torch.equal(model(**batch()).logits, before)
    assert not torch.equal(twin(**batch()).logits, before)
