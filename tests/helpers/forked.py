"""Python processes that are forked off one which has imported what takes seconds, and nothing of what a test looks at."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

# Neither fastreft nor PEFT nor Trainer, in whatever order a test imports them.
HELD = ("torch", "transformers.models.llama.modeling_llama")
# A process with threads must not fork, and these imports start some: numpy's OpenBLAS, and jemalloc in pyarrow.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
_PARENT = """
import importlib, json, os, sys, traceback

def child(asked):
    for stream, path in ((1, asked["out"]), (2, asked["err"])):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv, sys.path[:0] = ["-c", *asked["argv"]], asked["path"]
    sys.stdin = open(os.devnull)
    code = 0
    try:
        exec(asked["code"], {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    one = os.fork()
    if not one:
        child(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]), flush=True)
"""


@functools.cache
def _parent(held: tuple[str, ...]) -> subprocess.Popen[str]:
    """It ends when the process that started it does, with the pipe."""
    command = [sys.executable, "-c", _PARENT, *held]
    return subprocess.Popen(
        command, env=os.environ | _ONE_THREAD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run(
    code: str, *argv: str, held: tuple[str, ...] = HELD, path: tuple[str, ...] = (), cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """``python -c code argv``, by a process in which the modules ``held`` are imported already; ``path`` comes first in its
    ``sys.path``, ``env`` over this process's environment."""
    parent = _parent(held)
    environment: Mapping[str, str] = {**os.environ, **env}
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        asked = {"code": code, "argv": argv, "path": path, "cwd": str(cwd or Path.cwd()), "env": environment}
        print(json.dumps(asked | {"out": out.name, "err": err.name}), file=parent.stdin, flush=True)
        answer = parent.stdout.readline()
        assert answer, f"the process that holds {held} has ended"
        said, complained = (Path(file.name).read_text(errors="replace") for file in (out, err))
    return subprocess.CompletedProcess([sys.executable, *argv], int(answer), said, complained)


def processes() -> multiprocessing.context.ForkServerContext:
    """Processes forked off one that holds the modules, has run nothing and has one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fastreft.tasks.tune", "fastreft.tasks.train", "transformers.models.llama.modeling_llama"]
    )
    with mock.patch.dict(os.environ, _ONE_THREAD):
        forkserver.ensure_running()
    return context
