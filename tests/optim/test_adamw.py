"""Retraction and optimizers: R stays orthonormal whatever the optimizer, rank, dtype and history; nothing else is touched."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from common import DEVICES
from orthonormal import error

import fastreft.optim as O
from fastreft import functional as F
from fastreft import reference
from fastreft.interventions import DireftIntervention, LoreftIntervention, NoreftIntervention
from fastreft.ops import step as native_step


def train(model, optimizer, x, y, steps, check=None):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if check is not None:
            check()
    return losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 8), (4, 4096), (7, 100), (16, 16), (64, 300), (128, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_retraction(device, shape, dtype):
    """Orthonormal to the rounding of the dtype, and the L^-1 R of fp64."""
    torch.manual_seed(0)
    R = (torch.randn(*shape, dtype=torch.float64) / shape[1] ** 0.5 * 3).to(device, dtype)
    exact = R.double().clone()
    F.retract_([R])
    reference.retract_([exact])
    eps = torch.finfo(dtype).eps
    assert error(R) <= max(4 * eps, 1e-12)
    # A GPU's products are in fp32, so that the matrix moves by their rounding times its condition: near 100 for 16 x 16.
    near = 8 if device == "cuda" else 2
    torch.testing.assert_close(R.double(), exact, rtol=0, atol=near * eps if dtype is not torch.float64 else 1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_retraction_of_hard_ones(device):
    """Zero, repeated and nearly dependent rows, huge and tiny scales: always a defined orthonormal R, the same twice."""
    torch.manual_seed(0)
    base = torch.randn(4, 40)
    hard = [
        torch.zeros(3, 40),
        base[[0, 1, 0, 2]],
        base.clone(),
        base * 1e30,
        base * 1e-30,
        torch.eye(4, 4),
        torch.zeros(1, 1),
    ]
    hard[2][3] = hard[2][0] * (1 + 1e-6)
    again = [R.clone() for R in hard]
    for group in (hard, again):
        for R in group:
            R.data = R.data.to(device)
        F.retract_(group)
    for R, same in zip(hard, again, strict=True):
        assert error(R) <= 1e-6
        assert torch.equal(R, same)


@pytest.mark.parametrize("device", DEVICES)
def test_retraction_refuses_what_is_not_finite(device):
    good, bad = torch.randn(2, 9, device=device), torch.randn(2, 9, device=device)
    bad[1, 3] = float("nan")
    before = good.clone()
    with pytest.raises(ValueError, match=r"^matrices\[1\] holds a value that is not finite$"):
        F.retract_([good, bad])
    assert torch.equal(good, before)
    F.retract_([])


def test_matrices_of_several_devices_are_grouped():
    made = [torch.empty(1, 2, device=device) for device in ("cpu", "meta", "meta", "cpu", "meta")]
    assert native_step.by_device(made) == [[0, 3], [1, 2, 4]]


def test_retraction_over_several_devices(monkeypatch):
    """Where there is a GPU, with a CPU beside it; elsewhere two groups of one CPU stand for two devices."""
    torch.manual_seed(0)
    other = DEVICES[-1]
    if other == "cpu":
        monkeypatch.setattr(native_step, "by_device", lambda matrices: [[0, 2], [1]])
    given = [torch.randn(3, 20), torch.randn(2, 9).to(other), torch.randn(4, 30).T.contiguous().T]
    for bad in (0, 1):
        broken = [R.clone() for R in given]
        broken[bad][1, 1] = float("inf")
        before = [R.clone() for R in broken]
        with pytest.raises(ValueError, match=rf"^matrices\[{bad}\] holds a value that is not finite$"):
            F.retract_(broken)
        assert all(map(torch.equal, broken, before))
    together, alone = [R.clone() for R in given], [R.clone() for R in given]
    F.retract_(together)
    monkeypatch.undo()
    for R in alone:
        F.retract_([R])
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("orthonormal", [True, False])
def test_native_step_is_the_reference_step(device, orthonormal):
    torch.manual_seed(0)
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    module = (LoreftIntervention if orthonormal else NoreftIntervention)(embed_dim=50, low_rank_dimension=6).to(device)
    p = module.R if orthonormal else module.P
    exact = [p.detach().double().clone(), torch.zeros(6, 50, dtype=torch.float64, device=device)]
    exact.append(exact[1].clone())
    ours = O.ReftAdamW([p], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, r_lr_scale=1.0)
    for step in range(1, 6):
        p.grad = torch.randn(6, 50, device=device)
        reference.step_(
            exact[0],
            p.grad,
            exact[1],
            exact[2],
            orthonormal=orthonormal,
            **settings,
            correction1=1 - 0.9**step,
            correction2=1 - 0.99**step,
        )
        ours.step()
    torch.testing.assert_close(p.detach().double(), exact[0], rtol=0, atol=1e-6)


def test_adamw_on_plain_parameters_is_torchs():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(20, 7), torch.randn(20, 5)
    train(ours, O.ReftAdamW(ours.parameters(), lr=1e-2, weight_decay=0.3), x, y, 50)
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.3), x, y, 50)
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("r", [1, 2, 4, 8, 16, 64, 128])
@pytest.mark.parametrize("kind", ["ReftAdamW", "attached AdamW"])
def test_a_thousand_steps_save_load_and_go_on(r, kind):
    """max |R R^T - I| <= 1e-6 after every step at lr 1e-2 with weight decay, through a save and a load."""
    torch.manual_seed(r)
    model = LoreftIntervention(embed_dim=192, low_rank_dimension=r)
    x = torch.randn(8, 192)
    y = x + torch.randn(8, 192)

    def optimizer_of(model):
        if kind == "ReftAdamW":
            return O.ReftAdamW(O.param_groups(model, lr=1e-2, weight_decay=0.1))
        made = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        O.attach_retraction(made, model)
        return made

    worst = []
    check = lambda: worst.append(error(model.R))  # noqa: E731
    optimizer = optimizer_of(model)
    first = train(model, optimizer, x, y, 500, check)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = copy.deepcopy(model)
    whole_optimizer = optimizer_of(whole)
    whole_optimizer.load_state_dict(optimizer.state_dict())

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = LoreftIntervention(embed_dim=192, low_rank_dimension=r)
    model.load_state_dict(saved["model"])
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(saved["optimizer"])
    last = train(model, optimizer, x, y, 500, check)
    assert len(worst) == 1000
    assert max(worst) <= 1e-6
    assert last[-1] < first[0]
    train(whole, whole_optimizer, x, y, 500)
    assert torch.equal(whole.R, model.R)  # going on from the file is going on


def test_any_optimizer_is_taught_at_its_first_step():
    """A Trainer's own AdamW knows nothing of R: guard_optimizers keeps it orthonormal, weight decay included."""
    O.guard_optimizers()
    torch.manual_seed(0)
    model = DireftIntervention(embed_dim=64, low_rank_dimension=4)
    x, y = torch.randn(16, 64), torch.randn(16, 64)
    for make in (
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    ):
        losses = train(model, make(model.parameters()), x, y, 30)
        assert error(model.R) <= 1e-6
        assert losses[-1] < losses[0]


def test_attached_adam_takes_the_step_of_reftadamw():
    torch.manual_seed(0)
    one = LoreftIntervention(embed_dim=64, low_rank_dimension=4)
    two = copy.deepcopy(one)
    x, y = torch.randn(16, 64), torch.randn(16, 64)
    train(one, O.ReftAdamW(one.parameters(), lr=1e-3), x, y, 20)
    attached = torch.optim.AdamW(two.parameters(), lr=1e-3, weight_decay=0.0)
    O.attach_retraction(attached)
    O.attach_retraction(attached)  # twice is once
    train(two, attached, x, y, 20)
    torch.testing.assert_close(one.R, two.R, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.W, two.W, rtol=0, atol=1e-5)


def test_closures_schedulers_and_copies():
    torch.manual_seed(0)
    model = LoreftIntervention(embed_dim=32, low_rank_dimension=3)
    x, y = torch.randn(16, 32), torch.randn(16, 32)
    for optimizer in (O.ReftAdamW(model.parameters(), lr=1e-2), torch.optim.AdamW(model.parameters(), lr=1e-2)):
        if not isinstance(optimizer, O.ReftAdamW):
            O.attach_retraction(optimizer, model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        first = optimizer.step(closure).item()
        for _ in range(10):
            last = optimizer.step(closure).item()
            schedule.step()
        assert last < first
        assert error(model.R) <= 1e-6
    twin, twin_optimizer = copy.deepcopy((model, O.ReftAdamW(model.parameters(), lr=1e-2)))
    (twin(x) - y).square().mean().backward()
    twin_optimizer.step()
    assert error(twin.R) <= 1e-6


def test_weight_decay_reaches_W_and_never_R():
    torch.manual_seed(0)
    model = LoreftIntervention(embed_dim=32, low_rank_dimension=3)
    R, W = model.R.detach().clone(), model.W.detach().clone()
    groups = O.param_groups(model, lr=1e-2, weight_decay=0.5)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    O.ReftAdamW(model.parameters(), lr=1e-2, weight_decay=0.5).step()
    torch.testing.assert_close(model.R.detach(), R, rtol=0, atol=5e-7)
    torch.testing.assert_close(model.W.detach(), W * (1 - 1e-2 * 0.5))


def test_groups_of_the_same_settings_are_one_call(monkeypatch):
    """Of all but the decay, which no R has; and of one call or several the parameters are the same."""
    calls = []
    step = native_step.step_

    def counted(params, *rest):
        calls.append((len(params), rest[5], rest[6]["weight_decay"]))
        return step(params, *rest)

    monkeypatch.setattr(native_step, "step_", counted)

    def trained(groups):
        torch.manual_seed(0)
        model = LoreftIntervention(embed_dim=32, low_rank_dimension=3)
        x, y = torch.randn(4, 32), torch.randn(4, 32)
        train(model, O.ReftAdamW(groups(model), lr=1e-2, weight_decay=0.1), x, y, 3)
        made = calls.copy()
        calls.clear()
        return list(model.parameters()), made

    named = lambda m: {"params": [m.R]}, lambda m: {"params": [m.W], "weight_decay": 0.3}, lambda m: {"params": [m.b]}
    together, made = trained(lambda m: [group(m) for group in named])
    assert made == 3 * [(2, 1, 0.3), (1, 0, 0.1)]
    apart, made = trained(lambda m: [{**group(m), "eps": 1e-8 * (1 + 1e-9 * i)} for i, group in enumerate(named)])
    assert made == 3 * [(1, 0, 0.3), (1, 0, 0.1), (1, 1, 0.1)]
    assert all(map(torch.equal, together, apart))


def test_a_step_of_length_zero_moves_the_moments_alone():
    """The first step of a warm-up."""
    torch.manual_seed(0)
    model = LoreftIntervention(embed_dim=32, low_rank_dimension=3)
    before = model.R.detach().clone()
    optimizer = O.ReftAdamW(model.parameters(), lr=0.0, weight_decay=0.1)
    train(model, optimizer, torch.randn(4, 32), torch.randn(4, 32), 2)
    torch.testing.assert_close(model.R.detach(), before, rtol=0, atol=5e-7)
    assert optimizer.state[model.R]["exp_avg"].abs().sum() > 0
    assert optimizer.skipped() == 0


def test_errors_name_what_is_wrong_and_change_nothing():
    torch.manual_seed(0)
    model = LoreftIntervention(embed_dim=32, low_rank_dimension=3)
    optimizer = O.ReftAdamW([model.R, model.W], lr=1e-2)
    model.R.grad, model.W.grad = torch.zeros_like(model.R), torch.randn_like(model.W)
    model.R.grad[0, 0] = float("inf")
    before = model.R.detach().clone()
    with pytest.raises(FloatingPointError, match=r"params\[0\]"):
        optimizer.step()
    assert torch.equal(model.R, before)
    for make, words in (
        (lambda: O.ReftAdamW([model.R], lr=-1), "lr is -1"),
        (lambda: O.ReftAdamW([model.R], betas=(1.0, 0.9)), "betas is"),
        (lambda: O.attach_retraction(torch.optim.AdamW([model.W]), model), "holds no orthonormal R of model"),
        (lambda: O.attach_retraction("adam"), "optimizer is a str"),
        (lambda: O.param_groups(model.requires_grad_(False), lr=1), "no parameter that requires a gradient"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


@pytest.mark.parametrize("kind", ["flattened", "zero3"])
@pytest.mark.parametrize("made", [O.ReftAdamW, torch.optim.AdamW])
def test_an_R_of_which_the_rows_are_not_here_is_refused(kind, made):
    module = LoreftIntervention(embed_dim=12, low_rank_dimension=3)
    if kind == "flattened":
        module.R = torch.nn.Parameter(module.R.detach().flatten())
    else:
        module.R.ds_id = 0
    module.R.grad = torch.ones_like(module.R)
    before = module.R.detach().clone()
    O.guard_optimizers()
    with pytest.raises(ValueError, match=r"R is flattened or held by DeepSpeed's ZeRO-3.*FSDP2.*or keep R whole"):
        made([module.R], lr=0.1).step()
    assert torch.equal(module.R, before)
