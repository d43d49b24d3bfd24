"""Hyperparameters, of whichever group and whenever they come; and what a refused step leaves."""

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import fastreft
from fastreft import LoreftIntervention, ReftAdamW, attach_retraction, param_groups, retract_model_

INF, NAN = float("inf"), float("nan")
BAD = [
    *(("lr", value) for value in (-1, INF, NAN, "0.1", None, True, torch.tensor(-1.0))),
    *(("betas", value) for value in ((0.9,), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), 0.9, None)),
    *(("eps", value) for value in (0, -1, INF, NAN)),
    *(("weight_decay", value) for value in (-1, INF, NAN)),
    *(("r_lr_scale", value) for value in (0, -1, INF, NAN)),
]


def made():
    torch.manual_seed(0)
    return LoreftIntervention(embed_dim=8, low_rank_dimension=2)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_number_out_of_range_is_refused_wherever_it_comes(name, value):
    m = made()
    good = ReftAdamW(m.parameters())
    said = rf"^{name} is .*; it must be "
    with pytest.raises(ValueError, match=said):
        ReftAdamW(m.parameters(), **{name: value})
    with pytest.raises(ValueError, match=said):
        ReftAdamW([{"params": list(m.parameters()), name: value}])
    with pytest.raises(ValueError, match=said):
        good.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], name: value})
    state = good.state_dict()
    state["param_groups"][0][name] = value
    with pytest.raises(ValueError, match=said):
        good.load_state_dict(state)
    assert len(good.param_groups) == 1


@pytest.mark.parametrize("given", [{"lr": -1}, {"lr": NAN}, {"lr": 1e-3, "weight_decay": -1}])
def test_param_groups_and_the_guard_look_too(given):
    with pytest.raises(ValueError, match="it must be a finite number"):
        param_groups(made(), **given)
    m = made()
    with pytest.raises(ValueError, match="r_lr_scale is -1"):
        attach_retraction(torch.optim.SGD(m.parameters(), lr=0.1), r_lr_scale=-1)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", ["R", "W"])
def test_a_refused_step_is_none(name, capturable):
    m, twin = made(), made()
    optimizers = [ReftAdamW([getattr(x, name)], lr=0.1, capturable=capturable) for x in (m, twin)]
    for i in range(3):
        for x, optimizer in zip((m, twin), optimizers, strict=True):
            p = getattr(x, name)
            torch.manual_seed(i)
            p.grad = torch.randn_like(p)
            if x is m and i == 1:
                good, p.grad = p.grad, p.grad * NAN
                with pytest.raises(FloatingPointError, match=r"^the gradient of params\[0\] \(2, 8\) is not finite$"):
                    optimizer.step()
                p.grad = good
            optimizer.step()
    assert torch.equal(getattr(m, name), getattr(twin, name))
    ages = [int(o.state[getattr(x, name)]["step"]) for x, o in zip((m, twin), optimizers, strict=True)]
    assert ages == [3, 3]


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("rows", ["zero", "equal"])
def test_rows_that_are_no_rotations_are_not_called_a_gradient(rows):
    m = made()
    m.R.data.copy_(torch.zeros(2, 8) if rows == "zero" else torch.ones(2, 8))
    m.R.grad = torch.zeros(2, 8)
    optimizer = ReftAdamW([m.R], lr=0.1)
    try:
        optimizer.step()
    except FloatingPointError as refused:
        said = str(refused)
    else:
        said = "zero or dependent" if torch.allclose(m.R @ m.R.T, torch.eye(2), atol=1e-5) else "no rotation"
    assert "zero or dependent" in said and ".h:" not in said and ".cpp" not in said


def test_an_average_is_retracted_in_place():
    model = torch.nn.ModuleList([made()])
    mean = AveragedModel(model)
    mean.update_parameters(model)
    model[0].R.data.copy_(fastreft.LoreftIntervention(embed_dim=8, low_rank_dimension=2).R.data)
    mean.update_parameters(model)
    R = mean.module[0].R
    assert (R @ R.T - torch.eye(2)).abs().max() > 1e-2
    assert retract_model_(mean) == 1
    torch.testing.assert_close(R @ R.T, torch.eye(2), atol=1e-6, rtol=0)


def test_an_intervention_has_no_source():
    m = made()
    with pytest.raises(ValueError, match="source is not supported"):
        m(torch.randn(3, 8), source=torch.randn(3, 8))
    with pytest.raises(ValueError, match="source is not supported"):
        m(torch.randn(3, 8), torch.randn(3, 8))
    m(torch.randn(3, 8), None)
