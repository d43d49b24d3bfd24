"""Data-parallel training: two processes with half a batch each learn what one learns of the whole."""

import pytest
import torch
from conftest import assert_as_good
from tiny import batch, make
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from fastreft import ReftAdamW, ReftConfig, get_reft_model, param_groups

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")


def problem(dtype=torch.float32):
    """A model, and four samples with the same number of labels each."""
    torch.manual_seed(7)
    model = get_reft_model(make("llama"), ReftConfig(task_type="CAUSAL_LM", positions="f2+l3")).to(dtype).train()
    inputs = batch("left", (9, 4, 7, 5))
    labels = inputs["input_ids"].clone()
    labels[:, :7] = -100
    return model, inputs | {"labels": labels}


def step(model, call, given):
    """The gradients of a step, and the parameters after it."""
    optimizer = ReftAdamW(param_groups(model, lr=1e-2))
    call(**given).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad.clone() for p in trained]
    optimizer.step()
    return gradients, [p.detach() for p in trained]


def half(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, given = problem()
    mine = {name: value[2 * rank : 2 * rank + 2] for name, value in given.items()}
    torch.save(step(model, DistributedDataParallel(model), mine), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_learn_what_one_does(tmp_path):
    multiprocessing.spawn(half, (str(tmp_path),), nprocs=2)
    (gradients, after), (others, theirs) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip([*gradients, *after], [*others, *theirs], strict=True))
    model, given = problem()
    exact_model, _ = problem(torch.float64)
    assert_as_good(gradients, step(model, model, given)[0], step(exact_model, exact_model, given)[0])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    Rs = [p for name, p in zip(names, after, strict=True) if name.endswith(".R")]
    assert Rs
    for R in Rs:
        rounding = R.shape[1] * torch.finfo(R.dtype).eps  # of the products' sums
        assert float((R @ R.T - torch.eye(len(R))).abs().max()) < rounding
