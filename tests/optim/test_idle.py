"""Rows of R that no sample of a step was edited with stay as they are, whatever the others do."""

import copy
import warnings

import pytest
import torch
from orthonormal import error
from tiny import batch, make

from fastreft import ReftAdamW, ReftConfig, get_reft_model, param_groups
from fastreft.optim import guard

GROUPS = {"a": [0, 1, 2], "b": [3, 4]}


def made(**more):
    config = ReftConfig(r=5, positions="f2+l3", init_weights="random", subspaces=GROUPS, **more)
    return get_reft_model(make("llama"), config).train()


def loss_of(model, chosen):
    inputs = batch("right", (9, 9, 9))
    labels = torch.where(torch.arange(9) < 5, -100, inputs["input_ids"])
    return model(**inputs, labels=labels, subspaces=chosen).loss


def steps(model, optimizer, chosen, count=4):
    for _ in range(count):
        loss_of(model, chosen).backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def optimizers(model, kind):
    if kind == "ours":
        return ReftAdamW(param_groups(model, lr=1e-2))
    if kind == "capturable":
        return ReftAdamW(param_groups(model, lr=1e-2), capturable=True)
    of = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
    return of([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("kind", ["ours", "capturable", "adamw", "sgd"])
@pytest.mark.parametrize(("chosen", "idle"), [("a", [3, 4]), ("b", [0, 1, 2]), (["b", [], "b"], [0, 1, 2])], ids=str)
def test_the_others_stay(kind, chosen, idle):
    model = made()
    before = trainable(model)
    steps(model, optimizers(model, kind), chosen)
    moving = [i for i in range(5) if i not in idle]
    for name, now in trainable(model).items():
        assert torch.equal(now[idle], before[name][idle]), name
        assert (now[moving] != before[name][moving]).any(), name
        if name.endswith(".R"):
            assert error(now) < 1e-6


def test_both_in_a_batch_step_as_ever():
    """No row is idle then: the step is the one without any of this, bit for bit."""
    model = made()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        optimizer = ReftAdamW(param_groups(each, lr=1e-2))
        if each is twin:
            for module in each.modules():
                if hasattr(module, "partition"):
                    module.__class__ = type(
                        module.__class__.__name__, (module.__class__,), {"by_rows": property(no, put)}
                    )
        steps(each, optimizer, ["a", "b", None])
    for now, wanted in zip(trainable(model).values(), trainable(twin).values(), strict=True):
        assert torch.equal(now, wanted)


def no(_module):
    return False


def put(_module, _value):
    pass


def test_groups_in_turn_stay_orthonormal_and_learn():
    model = made()
    optimizer = ReftAdamW(param_groups(model, lr=1e-2))
    first = {chosen: loss_of(model, chosen).item() for chosen in "ab"}
    for _ in range(6):
        steps(model, optimizer, "a", 1)
        steps(model, optimizer, "b", 1)
    assert all(loss_of(model, chosen).item() < first[chosen] for chosen in "ab")
    for name, now in trainable(model).items():
        if name.endswith(".R"):
            assert error(now) < 1e-6


def test_a_step_is_that_of_the_group_alone():
    """One step of SGD on group b: R_b less its gradient, made orthonormal beside R_a."""
    model = made(layers_to_transform=[1])
    (module,) = (m for m in model.modules() if hasattr(m, "by_rows"))
    old = module.R.detach().clone()
    optimizer = torch.optim.SGD([module.R], lr=1e-2)
    loss_of(model, "b").backward()
    gradient = module.R.grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    A = gradient.double() @ old.double().T
    projected = gradient.double() - 0.5 * (A + A.T) @ old.double()
    moved = old.double()[3:] - guard.R_LR_SCALE * 1e-2 * projected[3:]
    beside = moved - moved @ old[:3].double().T @ old[:3].double()
    L = torch.linalg.cholesky(beside @ beside.T)
    torch.testing.assert_close(module.R[3:].double(), torch.linalg.solve(L, beside), rtol=0, atol=1e-6)
