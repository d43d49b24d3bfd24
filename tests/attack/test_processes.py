"""Trainings that are killed, or whose disk is full: resumed with the same bits, and nothing lost or mixed. Studies that are
killed: gone on with, and no trial of theirs lost.
"""

import functools
import itertools
import random
import sqlite3
import time
from contextlib import closing

import pytest
import trained
import yaml
from mutations import CASES, SEED

from fastreft.tasks.checkpoints import lacks
from fastreft.tasks.places import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG, MODEL_WEIGHTS
from fastreft.tasks.run_log import read_log

RESUME = ("--resume_from_checkpoint", "true")
ADAPTED = ("reft", "classifier", "lora")  # and of the others the whole model is saved


def saved_in(folder, kind):
    """The bytes of what was trained, by name; empty where a reader would find none."""
    names = (ADAPTER_WEIGHTS, ADAPTER_CONFIG) if kind in ADAPTED else (MODEL_WEIGHTS, MODEL_CONFIG)
    found = {name: folder / "out" / name for name in names}
    return {name: path.read_bytes() for name, path in found.items()} if found[names[1]].exists() else {}


def kinds(least):
    """A kind for each case: all in turn, and in the short form the first ``least``."""
    return enumerate(itertools.islice(itertools.cycle(trained.KINDS), max(CASES // 40, least)))


def kills(dice):
    """How often a run is killed; once in the short form."""
    return dice.choice((1, 1, 2, 3)) if CASES > 40 else 1


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Of a kind, (what a run ends with, the size of its largest file); each is run once."""

    @functools.cache
    def run(kind):
        folder = tmp_path_factory.mktemp(kind)
        trained.write_records(folder / "train.jsonl")
        assert trained.finish(folder, *trained.KINDS[kind]) == 0, trained.said(folder)
        return saved_in(folder, kind), max(path.stat().st_size for path in (folder / "out").rglob("*"))

    return run


def newest(folder):
    """The number of the newest checkpoint, whole or not."""
    return max((int(path.name.rpartition("-")[2]) for path in (folder / "out").glob("checkpoint-*")), default=0)


def test_killed_trainings_end_where_an_unbroken_one_ends(unbroken, tmp_path, counts):
    dice = random.Random(SEED + 4)
    for i, kind in kinds(2):
        (wanted, _), folder = unbroken(kind), tmp_path / f"run{i}"
        folder.mkdir()
        trained.write_records(folder / "train.jsonl")
        flags: tuple[str, ...] = trained.KINDS[kind]
        for kill in range(kills(dice)):
            process = trained.start(folder, *flags)
            begun = 2 * dice.randrange(7)  # steps, of twelve, with a checkpoint each two
            while process.is_alive() and newest(folder) < begun:
                time.sleep(0.001)
            time.sleep(dice.uniform(0, 0.03))
            process.kill()
            process.join()
            assert saved_in(folder, kind) in ({}, wanted), (i, kind, kill)
            checkpoints = list((folder / "out").glob("checkpoint-*"))
            whole = sum(lacks(path, adapter=kind in ADAPTED) is None for path in checkpoints)
            counts[f"kill, {kind}: {len(checkpoints) - whole} torn, {'some' if whole else 'none'} whole"] += 1
            flags = (*trained.KINDS[kind], *RESUME) if whole else trained.KINDS[kind]
        code = trained.finish(folder, *flags)
        assert code == 0, (i, kind, trained.said(folder))
        assert saved_in(folder, kind) == wanted and read_log(folder / "out")["steps"] == 12, (i, kind)
        assert not list((folder / "out").glob(".saving-*")), (i, kind)
        counts[f"killed training, {kind}, {'resumed' if RESUME[0] in flags else 'begun again'}: the same bits"] += 1


def test_trainings_whose_disk_is_full(unbroken, tmp_path, counts):
    """No file may grow beyond a limit, which is what a full disk looks like to those that write."""
    dice, held = random.Random(SEED + 5), {}
    for i, kind in kinds(1):
        (wanted, largest), folder = unbroken(kind), tmp_path / kind
        if kind not in held:
            folder.mkdir()
            trained.write_records(folder / "train.jsonl")
            assert trained.finish(folder, *trained.KINDS[kind], "--seed", "1", "--save_strategy", "no") == 0
            held[kind] = saved_in(folder, kind)
            assert held[kind] and held[kind] != wanted
        flags = dice.choice(((), ("--save_strategy", "no")))
        limit = int(dice.uniform(0, 1.1) ** 2 * largest)
        code = trained.finish(folder, *trained.KINDS[kind], *flags, limit=limit)
        said = trained.said(folder)
        assert "Traceback" not in said and code in (0, 2), (i, kind, said[-600:])
        if code == 2:
            assert sum(line.startswith("fastreft train: ") for line in said.splitlines()) == 1, (i, kind, said[-600:])
        assert saved_in(folder, kind) == (held[kind] if code else wanted), (i, kind)
        held[kind] = saved_in(folder, kind)
        counts[f"full disk, {kind}: exit {code}, {'the old one kept' if code else 'whole'}"] += 1


def completed(folder, sound=False):
    """Number -> (value, parameters) of a study's trials that came to their end, as its file has them. With ``sound`` the file
    is held to be that, too."""
    path = folder / "out" / "study.sqlite"
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path)) as file:
        assert not sound or file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        if not file.execute("SELECT 1 FROM sqlite_master WHERE name = 'trial_values'").fetchall():
            return {}
        ended = file.execute(
            "SELECT trial_id, number, value FROM trials JOIN trial_values USING (trial_id) WHERE state = 'COMPLETE'"
        ).fetchall()
        chosen = "SELECT param_name, param_value FROM trial_params WHERE trial_id = ?"
        return {number: (value, dict(file.execute(chosen, (trial,)))) for trial, number, value in ended}


def test_killed_studies_keep_their_trials(tmp_path, counts):
    pytest.importorskip("optuna")
    dice = random.Random(SEED + 7)
    for i in range(max(CASES // 100, 1)):
        folder, kept = tmp_path / f"study{i}", {}
        folder.mkdir()
        trained.write_records(folder / "train.jsonl")
        for kill in range(kills(dice)):
            process = trained.start(folder, *trained.STUDY, command="tune")
            begun = dice.randrange(trained.TRIALS + 1)  # trials; before the first, the study's file
            while process.is_alive() and not (
                len(completed(folder)) >= begun and (folder / "out" / "study.sqlite").exists()
            ):
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.3))
            process.kill()
            process.join()
            found = completed(folder, sound=True)
            assert kept.items() <= found.items(), (i, kill)
            kept = found
            counts[f"kill of a study: {len(kept)} trials at their end"] += 1
        code = trained.finish(folder, *trained.STUDY, command="tune")
        assert code == 0, (i, trained.said(folder))
        found = completed(folder, sound=True)
        assert len(found) == trained.TRIALS and kept.items() <= found.items(), i
        assert len({str(parameters) for _, parameters in found.values()}) == trained.TRIALS, (i, found)
        best = yaml.safe_load((folder / "out" / "best.yaml").read_text())
        assert best["r"] == min(found.values(), key=lambda trial: trial[0])[1]["r"], (i, best)
        assert not list((folder / "out").glob(".saving-*")), i
        counts["killed study: as many trials as asked for, none lost"] += 1
