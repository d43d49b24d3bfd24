"""Whole runs of ``fastreft train`` in processes of their own, to be killed or to run out of disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
from pathlib import Path

FLAGS = (
    *("--model", "embedded", "--r", "2", "--layers_to_transform", "1", "2", "--learning_rate", "1e-2"),
    *("--max_steps", "12", "--save_steps", "2", "--per_device_train_batch_size", "4"),
    *("--use_cpu", "--disable_tqdm", "true", "--report_to", "none"),
)


def write_records(path: Path) -> None:
    pairs = [(who, how) for who in ("king", "boy", "dog", "cat") for how in ("sad", "happy", "old", "cold")]
    records = [{"prompt": f"The {who} was {how}.", "completion": f' "I am {how}," said he.'} for who, how in pairs]
    path.write_text("\n".join(map(json.dumps, records)))


def start(folder: Path, *flags: str, limit: int | None = None) -> multiprocessing.Process:
    """A run into ``folder / "out"``, started; no file of it may grow over ``limit`` bytes. What it says is in :func:`said`.

    The process is forked off one that holds the modules and has run nothing, as a process with torch's threads must not fork.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["trained", "fastreft.tasks.train"])
    flags = ("--train_file", str(folder / "train.jsonl"), "--output_dir", str(folder / "out"), *FLAGS, *flags)
    process = processes.Process(target=_train, args=(flags, str(folder / "said"), limit))
    process.start()
    return process


def finish(folder: Path, *flags: str, limit: int | None = None) -> int:
    """The exit code of a run that nobody kills."""
    process = start(folder, *flags, limit=limit)
    process.join()
    return process.exitcode


def said(folder: Path) -> str:
    return (folder / "said").read_text(errors="replace")


def _train(flags: tuple[str, ...], heard: str, limit: int | None) -> None:
    import torch

    from fastreft.cli import main

    file = os.open(heard, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(main(["train", *flags]))
