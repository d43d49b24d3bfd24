"""Whole runs of ``fastreft train`` and ``tune`` in processes of their own, to be killed or to run out of disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import threading
from pathlib import Path

import forked

FLAGS = (
    *("--model", "embedded", "--r", "2", "--layers_to_transform", "1", "2", "--learning_rate", "1e-2"),
    *("--max_steps", "12", "--save_steps", "2", "--per_device_train_batch_size", "4"),
    *("--use_cpu", "--disable_tqdm", "true", "--report_to", "none"),
)
LABELLED = ("--text_field", "prompt", "--label_field", "how")
# What can be trained, and so be lost: an adapter, one with a head, another method's, all of a model, a part of it.
KINDS = {
    "classifier": LABELLED,
    "full": ("--method", "full", "--save_total_limit", "2"),
    "reft": (),
    "lora": ("--method", "lora", "--method_config", '{"r": 2, "target_modules": ["q_proj"]}'),
    "head": ("--method", "head", *LABELLED, "--save_total_limit", "2"),
}
TRIALS = 3
STUDY = (
    *("--hold_out", "4", "--max_steps", "1", "--trials", str(TRIALS)),
    *("--search", "rate_factor=0.5:2:log", "r=1:4"),
)


def write_records(path: Path) -> None:
    pairs = [(who, how) for who in ("king", "boy", "dog", "cat") for how in ("sad", "happy", "old", "cold")]
    records = [
        {"prompt": f"The {who} was {how}.", "completion": f' "I am {how}," said he.', "how": how} for who, how in pairs
    ]
    path.write_text("\n".join(map(json.dumps, records)))


def start(folder: Path, *flags: str, limit: int | None = None, command: str = "train") -> multiprocessing.Process:
    """A run into ``folder / "out"``, started; no file of it may grow over ``limit`` bytes. What it says comes through a pipe,
    which is no file, and is in :func:`said` when it has ended."""
    processes = forked.processes()
    flags = ("--train_file", str(folder / "train.jsonl"), "--output_dir", str(folder / "out"), *FLAGS, *flags)
    hear, speak = processes.Pipe(duplex=False)
    process = processes.Process(target=_run, args=([command, *flags], speak, limit))
    process.start()
    speak.close()
    listener = threading.Thread(target=_listen, args=(hear, folder / "said"))
    listener.start()
    process.listener = listener
    return process


def finish(folder: Path, *flags: str, limit: int | None = None, command: str = "train") -> int:
    """The exit code of a run that nobody kills."""
    process = start(folder, *flags, limit=limit, command=command)
    process.join()
    process.listener.join()
    return process.exitcode


def _listen(hear, path: Path) -> None:
    with path.open("wb") as file:
        while chunk := os.read(hear.fileno(), 1 << 16):
            file.write(chunk)


def said(folder: Path) -> str:
    return (folder / "said").read_text(errors="replace")


def _run(words: list[str], speak, limit: int | None) -> None:
    import torch

    from fastreft.cli import main

    os.dup2(speak.fileno(), 1)
    os.dup2(speak.fileno(), 2)
    speak.close()
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(main(words))
