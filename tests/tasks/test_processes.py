"""`fastreft train` in two processes: what one learns of a batch twice as large, told, written and refused once."""

import json
import os
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import forked
import pair
import pytest
import torch
from safetensors.torch import load_file
from shell import fails
from tiny import save_bert
from torch import distributed

from fastreft.cli import main
from fastreft.tasks import processes

needs_gloo = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")

# Prompts and completions of many lengths: the loss has to be a mean over the tokens of both processes' records. 20 records of
# the same task's: batches of four come out even, as the last of an epoch is else filled up with records of its beginning.
TASK = """
from fastreft.tasks.sets import Record, register

WORDS = "the king was sad and the boy went to the river with a dog".split()

@register("mine", max_new_tokens=2)
def mine(split, folder):
    if split == "test":
        yield Record("nobody knows", " why", "why")
        return
    for i in range(20):
        prompt = " ".join(WORDS[(i + j) % len(WORDS)] for j in range(3 + 7 * i % 11))
        yield Record(prompt, "".join(f" {WORDS[(3 * i + j) % len(WORDS)]}" for j in range(2 + 5 * i % 9)), "why")
"""
# Each at any free port.
TORCHRUN = (
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=127.0.0.1:0",
    "-m",
    "--",
)
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0", "-m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the task is, and what all runs are told."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "mine.py").write_text(TASK)
    (folder / "train.yaml").write_text(json.dumps({
        "model": "embedded", "task": "mine", "task_module": str(folder / "mine.py"), "r": 2, "layers_to_transform": [1, 2],
        "max_steps": 4, "save_steps": 2, "use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1,
        "ddp_find_unused_parameters": False,
    }))  # fmt: skip
    return folder


def flags(folder, name, each, *more):
    where = ("--config", str(folder / "train.yaml"), "--output_dir", str(folder / name))
    return ("train", *where, "--per_device_train_batch_size", str(each), *more)


def launched(folder, *arguments, by):
    """What a launcher makes of it: its words, both processes' among them, and its exit code."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", *by, "fastreft", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def one(folder, name, *more):
    """The weights and the log of a run in this process, with the batch of two."""
    assert main(list(flags(folder, name, 4, *more))) == 0
    return found(folder, name)


def found(folder, name):
    weights = load_file(folder / name / "adapter_model.safetensors")
    return weights, json.loads((folder / name / "training.json").read_text())


def assert_same(a, b):
    """Not the same bits: two halves of a batch are padded to lengths of their own, and their gradients are sums of sums. Adam
    makes of a gradient's relative rounding (1e-6) as large a part of its step (0.05 here)."""
    (weights, log), (others, theirs) = a, b
    assert weights.keys() == others.keys() and weights
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], atol=1e-5, rtol=0)
    assert log["learning_rate"] == theirs["learning_rate"] and log["steps"] == theirs["steps"]
    for step, other in zip(log["history"], theirs["history"], strict=True):
        assert step.get("loss") == pytest.approx(other.get("loss"), abs=1e-4)


@pytest.fixture(scope="module")
def alone(folder):
    return one(folder, "one")


@needs_gloo
def test_two_processes_learn_what_one_does_and_one_of_them_speaks(folder, alone):
    """Started by accelerate, which calls what torchrun is (torch.distributed.run), and sets more."""
    done = launched(folder, *flags(folder, "two", 2, "--r", "2"), by=ACCELERATE)
    assert done.returncode == 0, done.stderr
    assert_same(found(folder, "two"), alone)
    lines = done.stdout.splitlines()
    assert "has started one" not in done.stdout
    for said in ("note: learning_rate", "trained ", "train loss", "mine: accuracy", "saved to"):
        assert sum(line.startswith(said) for line in lines) == 1, done.stdout
    assert sum("'loss'" in line for line in lines) == 4
    assert found(folder, "two")[1]["scores"]["mine"]["records"] == 1
    # each has kept the state of its random numbers, and goes on from there; of one launcher, as MKL's bits are a process's own
    pair.run(folder, *flags(folder, "two-forked", 2, "--r", "2"))
    checkpoint = folder / "two-forked" / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    pair.run(folder, *flags(folder, "two-resumed", 2, "--resume_from_checkpoint", str(checkpoint)))
    weights, unbroken = found(folder, "two-resumed")[0], found(folder, "two-forked")[0]
    assert all(torch.equal(weights[name], tensor) for name, tensor in unbroken.items())


def test_one_process_of_several_that_accelerate_was_asked_for_says_so(folder, capsys, monkeypatch):
    """What `accelerate launch --cpu --num_processes 2` sets where there is no MPI."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    one(folder, "asked", "--max_steps", "1")
    assert "asked for several processes and has started one" in capsys.readouterr().out


@needs_gloo
@pytest.mark.default_start
def test_two_processes_learn_what_one_does_of_labels(tmp_path):
    """Whose losses are means: Trainer would take them for sums over the tokens of both, and count them twice."""
    words = "good bad dull fine".split()
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"t": f"{a} {b}", "l": a}) for a in words for b in words))
    where = ["--model", save_bert(tmp_path / "bert", words), "--train_file", str(data), "--text_field", "t"]
    usual = "--label_field l --max_steps 3 --learning_rate 1e-2 --use_cpu true --save_strategy no".split()
    run = ["train", *where, *usual, "--report_to", "none", "--logging_steps", "1", "--per_device_train_batch_size"]
    assert main([*run, "8", "--output_dir", str(tmp_path / "one")]) == 0
    pair.run(tmp_path, *run, "4", "--output_dir", str(tmp_path / "two"))
    losses = [[x["loss"] for x in found(tmp_path, name)[1]["history"] if "loss" in x] for name in ("one", "two")]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=1e-3)


@needs_gloo
def test_shards_learn_are_saved_and_scored_as_a_whole_model_is(folder, alone):
    done = pair.run(folder, *flags(folder, "shards", 2, "--fsdp"), as_gpus=True)
    assert_same(found(folder, "shards"), alone)
    assert "scores" in found(folder, "shards")[1]
    assert ["mine: accuracy" in said for said in done] == [True, False]
    checkpoint = folder / "shards" / "checkpoint-2"
    assert (checkpoint / "pytorch_model_fsdp.bin").exists()  # it was in shards
    # Not the same bits: torch makes an optimizer's state, before it loads one, by a step with a rate of 0, which retracts.
    more = ("--fsdp", "true", "--resume_from_checkpoint", str(checkpoint))
    pair.run(folder, *flags(folder, "shards-resumed", 2, *more), as_gpus=True)
    assert_same(found(folder, "shards-resumed"), alone)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells of threads")
def test_what_they_are_forked_off_has_one_thread():
    one = forked.processes().Process(target=int)
    one.start()  # once its parent has the modules
    one.join()
    assert one.exitcode == 0
    threads = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/task")
    assert len(list(threads.iterdir())) == 1


@needs_gloo
def test_an_error_of_both_is_said_once(folder):
    """Started by torchrun, which would take --r for a flag of its own, but for the --."""
    done = launched(folder, *flags(folder, "none", 2, "--r", "0"), by=TORCHRUN)
    assert done.returncode != 0 and not (folder / "none").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("fastreft train: ")]
    assert len(said) == 1 and "r is 0" in said[0]
    assert "exitcode  : 2" in done.stderr


def test_a_process_speaks_late_where_the_first_of_its_machine_does_not(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(processes.time, "sleep", waited.append)
    processes.complain("alone")
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    processes.complain("mine alone")
    assert waited == [processes.PATIENCE]
    assert capsys.readouterr().err.splitlines() == ["alone", "mine alone (process 1 of 2)"]


def test_other_commands_run_in_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(main(["eval", "--adapter", "nowhere"]), capsys, "WORLD_SIZE is 2", "train takes several")


def test_what_accelerate_would_leave_out_is_refused(folder, capsys, monkeypatch):
    fails(main([*flags(folder, "none", 2, "--fsdp", "true")]), capsys, "fsdp", "distributed")
    monkeypatch.setenv("WORLD_SIZE", "2")  # and no accelerator, nor --use_cpu: each would train alone
    fails(main([*flags(folder, "none", 2, "--use_cpu", "false")]), capsys, "there are 2 processes", "--use_cpu")
    assert not (folder / "none").exists()
