"""ReftAdamW(capturable=True): the same bits as without, ages and learning rate in device memory, and a CUDA graph of it."""

from __future__ import annotations

import copy

import pytest
import torch
from common import DEVICES
from orthonormal import error

from fastreft.interventions import LoreftIntervention
from fastreft.ops import step as native_step
from fastreft.optim import ReftAdamW, param_groups


def pair(device: str, dtype: torch.dtype = torch.float32) -> tuple[LoreftIntervention, LoreftIntervention]:
    torch.manual_seed(0)
    one = LoreftIntervention(embed_dim=600, low_rank_dimension=5).to(device, dtype)
    return one, copy.deepcopy(one)


def gradients(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("live_lr", [False, True])
def test_the_bits_of_a_step_that_is_not_capturable(device, dtype, live_lr):
    one, two = pair(device, dtype)
    lr = torch.tensor(1e-2, dtype=torch.float64, device=device) if live_lr else 1e-2
    plain = ReftAdamW(param_groups(one, lr=1e-2, weight_decay=0.1), betas=(0.9, 0.97))
    capturable = ReftAdamW(param_groups(two, lr=lr, weight_decay=0.1), betas=(0.9, 0.97), capturable=True)
    for step in range(40):
        for model, optimizer in ((one, plain), (two, capturable)):
            if step == 30:  # on from what was saved
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer.state.clear()
                optimizer.load_state_dict(saved)
            gradients(model, step)
            if step % 7 == 3:
                model.b.grad = None  # ages differ
            optimizer.step()
    assert same(one, two)
    assert {float(capturable.state[p]["step"]) for p in two.parameters()} == {40.0, 34.0}
    assert all(capturable.state[p]["step"].device.type == device for p in two.parameters())
    assert all(state["exp_avg"].dtype != torch.bfloat16 for state in capturable.state.values())


@pytest.mark.parametrize("device", DEVICES)
def test_a_schedule_moves_a_rate_that_is_a_tensor(device):
    one, two = pair(device)
    plain = ReftAdamW(param_groups(one, lr=0.25))
    capturable = ReftAdamW(param_groups(two, lr=torch.tensor(0.25, device=device)), capturable=True)
    # Halvings are exact in fp32.
    halving = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step) for o in (plain, capturable)]
    for step in range(8):
        for model, optimizer, schedule in zip((one, two), (plain, capturable), halving, strict=True):
            gradients(model, step)
            optimizer.step()
            schedule.step()
    assert isinstance(capturable.param_groups[0]["lr"], torch.Tensor)
    assert float(capturable.param_groups[0]["lr"]) == 0.25 * 0.5**8
    assert same(one, two)


def test_one_becomes_the_other():
    """Saved without ``capturable``, or before it was, and taken on with it."""
    one, two = pair("cpu")
    plain, other = ReftAdamW(param_groups(one, lr=1e-2)), ReftAdamW(param_groups(two, lr=1e-2), capturable=True)
    gradients(one, 0)
    plain.step()
    two.load_state_dict(one.state_dict())
    saved = copy.deepcopy(plain.state_dict())
    for group in saved["param_groups"]:
        del group["capturable"]
    other.load_state_dict(saved)
    assert not other.param_groups[0]["capturable"]
    for group in other.param_groups:
        group["capturable"] = True
    for model, optimizer in ((one, plain), (two, other)):
        gradients(model, 1)
        optimizer.step()
    assert same(one, two)
    for group in other.param_groups:
        group["capturable"] = False
    for model, optimizer in ((one, plain), (two, other)):
        gradients(model, 2)
        optimizer.step()
    assert same(one, two)


def test_a_capture_that_would_go_wrong_is_refused(monkeypatch):
    """On a CPU the capture is a pretence."""
    one, two = pair("cpu")
    plain = ReftAdamW(one.parameters(), lr=1e-2)
    capturable = ReftAdamW(two.parameters(), lr=1e-2, capturable=True)
    for model in (one, two):
        gradients(model, 0)
    plain.step()
    with monkeypatch.context() as captured:
        captured.setattr(native_step, "capturing", lambda t: True)
        with pytest.raises(RuntimeError, match=r"^an optimizer step is being captured.*capturable=True"):
            plain.step()
        with pytest.raises(RuntimeError, match=r"take one step before the capture$"):
            capturable.step()
    capturable.step()
    monkeypatch.setattr(native_step, "capturing", lambda t: True)
    capturable.param_groups[0]["lr"] = torch.tensor(1e-2, device="meta")
    with pytest.raises(RuntimeError, match=r"^lr is on meta and a parameter on cpu"):
        capturable.step()


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a CUDA device")
def test_replays_of_a_captured_step_are_eager_steps():
    one, two = pair("cuda")
    plain = ReftAdamW(param_groups(one, lr=0.5))
    lr = torch.tensor(0.5, device="cuda")
    capturable = ReftAdamW(param_groups(two, lr=lr), capturable=True)
    for model in (one, two):
        gradients(model, 0)
    plain.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        capturable.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capturable.step()
    for step in range(1, 6):
        gradients(one, step)
        with torch.no_grad():
            for p, q in zip(two.parameters(), one.parameters(), strict=True):
                p.grad.copy_(q.grad)
        for group in plain.param_groups:
            group["lr"] = 0.5**step
        lr.fill_(0.5**step)
        plain.step()
        graph.replay()
    torch.cuda.synchronize()
    assert same(one, two)
    assert error(two.R) <= 1e-6
