"""Trainings that are killed, or whose disk is full: resumed with the same bits, and nothing lost or mixed."""

import random
import time

import pytest
import trained
from mutations import CASES, SEED

from fastreft.tasks.checkpoints import lacks

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
RESUME = ("--resume_from_checkpoint", "true")


def adapter_in(folder):
    """The bytes of an adapter, by name; empty where a reader would find none."""
    found = {name: (folder / "out" / name) for name in ADAPTER}
    return {name: path.read_bytes() for name, path in found.items()} if found[ADAPTER[1]].exists() else {}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(the adapter that a run ends with, the size of its largest file)."""
    folder = tmp_path_factory.mktemp("unbroken")
    trained.write_records(folder / "train.jsonl")
    assert trained.finish(folder) == 0, trained.said(folder)
    return adapter_in(folder), max(path.stat().st_size for path in (folder / "out").rglob("*"))


def test_killed_trainings_end_where_an_unbroken_one_ends(unbroken, tmp_path, counts):
    dice, (wanted, _) = random.Random(SEED + 4), unbroken
    for i in range(max(CASES // 40, 1)):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        trained.write_records(folder / "train.jsonl")
        flags: tuple[str, ...] = ()
        for kill in range(dice.choice((1, 1, 2, 3))):
            process = trained.start(folder, *flags)
            begun = dice.randrange(7)  # checkpoints, of six
            while process.is_alive() and len(list((folder / "out").glob("checkpoint-*"))) < begun:
                time.sleep(0.001)
            time.sleep(dice.uniform(0, 0.03))
            process.kill()
            process.join()
            assert adapter_in(folder) in ({}, wanted), (i, kill)
            checkpoints = list((folder / "out").glob("checkpoint-*"))
            whole = sum(lacks(path) is None for path in checkpoints)
            counts[f"kill of a training: {len(checkpoints) - whole} torn, {'some' if whole else 'none'} whole"] += 1
            flags = RESUME if whole else ()
        code = trained.finish(folder, *flags)
        assert code == 0, (i, trained.said(folder))
        assert adapter_in(folder) == wanted, i
        assert not list((folder / "out").glob(".saving-*")), i
        counts[f"killed training, {'resumed' if flags else 'begun again'}: the same bits"] += 1


def test_trainings_whose_disk_is_full(unbroken, tmp_path, counts):
    """No file may grow beyond a limit, which is what a full disk looks like to those that write."""
    dice, (wanted, largest) = random.Random(SEED + 5), unbroken
    trained.write_records(tmp_path / "train.jsonl")
    assert trained.finish(tmp_path, "--seed", "1", "--save_strategy", "no") == 0
    old = adapter_in(tmp_path)
    assert old and old != wanted
    for i in range(max(CASES // 40, 1)):
        flags = dice.choice(((), ("--save_strategy", "no")))
        code = trained.finish(tmp_path, *flags, limit=int(dice.uniform(0, 1.1) ** 2 * largest))
        said = trained.said(tmp_path)
        assert "Traceback" not in said and code in (0, 2), (i, said[-600:])
        if code == 2:
            assert sum(line.startswith("fastreft train: ") for line in said.splitlines()) == 1, (i, said[-600:])
        assert adapter_in(tmp_path) == (old if code else wanted), i
        old = adapter_in(tmp_path)
        counts[f"full disk: exit {code}, {'the old adapter kept' if code else 'whole'}"] += 1
