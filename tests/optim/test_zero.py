"""DeepSpeed's ZeRO, with a stand-in for it: flat parts of all parameters, one of them this process's, beside whole ones.

The real one (0.19.8) gave what the plain optimizer gives, by hand: to 4e-7 at stage 2 in two processes, to 1e-6 in one.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from orthonormal import error
from shell import fails
from tiny import batch, make

from fastreft import ReftAdamW, ReftConfig, ZeroRetraction, get_reft_model, param_groups
from fastreft.cli import main


def problem():
    torch.manual_seed(3)
    model = get_reft_model(make("llama"), ReftConfig(task_type="CAUSAL_LM", positions="f2+l3", r=3)).train()
    inputs = batch("left", (9, 4, 7, 5))
    return model, inputs | {"labels": inputs["input_ids"].masked_fill(torch.arange(9) < 7, -100)}


class Flat:
    """ZeRO's optimizer with one process: an fp32 master of each group, flat, which a torch optimizer steps."""

    def __init__(self, optimizer):
        self.inner, self.groups = optimizer, [list(group["params"]) for group in optimizer.param_groups]
        for group, params in zip(optimizer.param_groups, self.groups, strict=True):
            master = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
            group["params"] = [master]
            for p, part in zip(params, master.data.split([p.numel() for p in params]), strict=True):
                p._hp_mapping = part

    def step(self):
        for group, params in zip(self.inner.param_groups, self.groups, strict=True):
            group["params"][0].grad = torch.cat([p.grad.flatten() for p in params])
        self.inner.step()
        for params in self.groups:
            for p in params:
                p.data.copy_(p._hp_mapping.view_as(p))
                p.grad = None


@pytest.fixture
def deepspeed(monkeypatch):
    utils = SimpleNamespace(
        safe_get_full_fp32_param=lambda p: p._hp_mapping.clone().view_as(p),
        safe_set_full_fp32_param=lambda p, value: p._hp_mapping.copy_(value.flatten()),
    )
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)


def adamw(model):
    return ReftAdamW(param_groups(model, lr=1e-2))


def torchs(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("made", [adamw, torchs])
def test_flat_parts_learn_what_whole_parameters_do(made, deepspeed):
    model, given = problem()
    optimizer = made(model)
    for _ in range(3):
        for _ in range(2):  # gradients of two batches
            model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    flat_model, _ = problem()
    flat, kept = Flat(made(flat_model)), ZeroRetraction()
    kept.on_train_begin(None, None, None, model=flat_model)
    for _ in range(3):
        for _ in range(2):
            flat_model(**given).loss.backward()
        flat.step()
        kept.on_optimizer_step(None, None, None)
    for (name, p), q in zip(model.named_parameters(), flat_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=0, msg=name)
        if name.endswith(".R"):
            assert error(q) < 1e-6
            assert torch.equal(q.flatten(), q._hp_mapping)


@pytest.mark.parametrize("made", [adamw, torchs])
def test_flat_parts_that_nobody_retracts_are_refused(made, deepspeed):
    model, given = problem()
    flat = Flat(made(model))
    model(**given).loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"ZeroRetraction\(\)"):
        flat.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_without_flat_parts_is_left_alone():
    model, _ = problem()
    kept = ZeroRetraction()
    kept.begin(model)
    kept.after_step()
    assert not any(p._backward_hooks for p in model.parameters())
    with pytest.raises(ValueError, match="r_lr_scale is 0"):
        ZeroRetraction(0)


def emptied(p):
    """A parameter as ZeRO-3 leaves it between uses."""
    p.ds_id, p.data = 1, torch.empty(0)


def test_zero_3_is_refused_in_python(calls):
    model, given = problem()
    model(**given)  # a layer has been looked at before
    for name, p in model.named_parameters():
        if "reft" in name:
            emptied(p)
    with pytest.raises(ValueError, match="ZeRO-3"):
        model(**given)
    with torch.no_grad(), pytest.raises(ValueError, match="ZeRO-3"):
        model.eval()(**given)
    base = make("llama")
    emptied(next(base.parameters()))
    with pytest.raises(ValueError, match="ZeRO-3"):
        get_reft_model(base, ReftConfig(r=2))
    assert not any("reft" in name for name, _ in base.named_modules())


def flags(tmp_path, *more):
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    where = ("--train_file", str(data), "--output_dir", str(tmp_path / "out"))
    return ["train", "--model", "embedded", *where, *more]


def test_zero_3_and_odd_configurations_are_refused_on_the_command_line(tmp_path, capsys, monkeypatch):
    stage = {"zero_optimization": {"stage": 3}}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(stage))
    for given in (str(file), json.dumps(stage)):
        fails(main(flags(tmp_path, "--deepspeed", given)), capsys, "deepspeed", "stage 3", "1 or 2")
    (tmp_path / "train.yaml").write_text(json.dumps({"deepspeed": stage}))
    fails(main(flags(tmp_path, "--config", str(tmp_path / "train.yaml"))), capsys, "stage 3")
    fails(main(flags(tmp_path, "--deepspeed", str(tmp_path / "no.json"))), capsys, "deepspeed", "cannot be read")
    file.write_text("{")
    fails(main(flags(tmp_path, "--deepspeed", str(file))), capsys, "deepspeed", "not JSON")
    file.write_text("[]")
    fails(main(flags(tmp_path, "--fsdp_config", str(file))), capsys, "fsdp_config", "JSON object")
    fails(main(flags(tmp_path, "--fsdp", "--fsdp_config", '{"version": 1}')), capsys, "fsdp_config", "version 1")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as accelerate launch --use_deepspeed says it
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    fails(main(flags(tmp_path)), capsys, "stage 3")
    assert not (tmp_path / "out").exists()
