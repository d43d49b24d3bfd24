"""One process of several (torchrun, accelerate launch): which it is, and what is said once. Imports nothing that takes time.

The launchers tell by the environment: WORLD_SIZE, RANK among all, LOCAL_RANK on this machine.
"""

from __future__ import annotations

import os
import sys
import time

from .errors import UserError

SEVERAL = ("train",)  # the commands that run in several processes
PATIENCE = 15.0  # seconds


def _of_environment(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise


def count() -> int:
    """How many processes run this command together."""
    return _of_environment("WORLD_SIZE", 1)


def is_first() -> bool:
    """Is this the one that prints and writes?"""
    return _of_environment("RANK", 0) == 0


def is_alone_of_several() -> bool:
    """Was accelerate asked for several processes, and has started this one? On a CPU (--cpu) it does so without MPI."""
    return {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= {*os.environ} and "WORLD_SIZE" not in os.environ


def check_command(command: str) -> None:
    """:class:`UserError` for a command in several processes that would each do, and write, the same."""
    if count() > 1 and command not in SEVERAL:
        raise UserError(
            f"WORLD_SIZE is {count()}, and this command runs in one process; of all commands, train takes several"
        )


def complain(text: str) -> None:
    """A line on stderr that ends the run, once a machine.

    What is wrong with the input every process finds, and a launcher ends those that are left when one has failed. So the first
    on a machine speaks, and another only where the first is still there after a while: it has found what that one has not.
    """
    if count() > 1 and _of_environment("LOCAL_RANK", 0) > 0:
        time.sleep(PATIENCE)
        text = f"{text} (process {_of_environment('RANK', 0)} of {count()})"
    print(text, file=sys.stderr)
