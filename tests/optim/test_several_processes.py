"""Data-parallel training, whole or in FSDP2's shards: two processes with half a batch each learn what one learns of it all."""

import faulthandler

import forked
import pytest
import torch
from common import assert_as_good
from peft import PeftModel
from tiny import batch, make
from torch import distributed, multiprocessing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastreft import ReftAdamW, ReftConfig, get_reft_model, param_groups
from fastreft.optim.shards import whole

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")


def problem(dtype=torch.float32, r=4):
    """A model, and four samples with the same number of labels each."""
    torch.manual_seed(7)
    model = (
        get_reft_model(make("llama"), ReftConfig(init_weights="random", task_type="CAUSAL_LM", positions="f2+l3", r=r))
        .to(dtype)
        .train()
    )
    inputs = batch("left", (9, 4, 7, 5))
    labels = inputs["input_ids"].clone()
    labels[:, :7] = -100
    return model, inputs | {"labels": labels}


def reft_adamw(model):
    return ReftAdamW(param_groups(model, lr=1e-2))


def guarded_adamw(model):
    """An optimizer that was told of no R: the guard teaches it."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def step(model, call, given, made=reft_adamw, steps=1):
    """The gradients of the first step, and the parameters after the last."""
    optimizer = made(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for _ in range(steps):
        call(**given).loss.backward()
        gradients = gradients or [whole(p.grad).clone() for p in trained]
        optimizer.step()
        optimizer.zero_grad()
    return gradients, [whole(p).detach() for p in trained]


def meet(rank, folder, r=4):
    """A model and this process's half of the batch."""
    faulthandler.enable()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, given = problem(r=r)
    return model, {name: value[2 * rank : 2 * rank + 2] for name, value in given.items()}


def leave():
    distributed.barrier()  # gloo takes a peer that has left for one that has failed
    distributed.destroy_process_group()


def half(rank, folder):
    model, mine = meet(rank, folder)
    torch.save(step(model, DistributedDataParallel(model), mine), f"{folder}/{rank}.pt")
    leave()


def half_in_shards(rank, folder, made, r):
    model, mine = meet(rank, folder, r)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    torch.save(step(model, model, mine, made, steps=3), f"{folder}/{rank}.pt")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(f"{folder}/saved", state_dict=state)
    leave()


def both(work, *arguments):
    forked.processes()  # which says what those that are forked begin with
    multiprocessing.start_processes(work, arguments, nprocs=2, start_method="forkserver")


@pytest.mark.parametrize("r", [3, 1])  # uneven shards, and one of the two without a row
@pytest.mark.parametrize("made", [reft_adamw, guarded_adamw])
def test_two_processes_with_shards_learn_what_one_does(made, r, tmp_path):
    both(half_in_shards, str(tmp_path), made, r)
    (gradients, after), (others, theirs) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip([*gradients, *after], [*others, *theirs], strict=True))
    model, given = problem(r=r)
    wanted, wanted_after = step(model, model, given, made, steps=3)
    exact_model, _ = problem(torch.float64, r)
    exact, exact_after = step(exact_model, exact_model, given, made, steps=3)
    assert_as_good(gradients, wanted, exact)
    assert_as_good(after, wanted_after, exact_after)
    again = PeftModel.from_pretrained(make("llama"), tmp_path / "saved")
    loaded = [p for name, p in again.named_parameters() if "reft" in name]
    assert len(loaded) == len(after) and all(torch.equal(a, b) for a, b in zip(loaded, after, strict=True))


def test_two_processes_learn_what_one_does(tmp_path):
    both(half, str(tmp_path))
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
