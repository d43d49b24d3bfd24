"""What launch.cu makes of a device's answers, by a runtime that answers as it is told: tests/cuda/runtime. Needs nvcc,
which compiles for the host here; no GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_nvcc import CSRC, nvcc

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc here")


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Asks of the current device one after the other, in one process: (major, ptx, error of the first call) each."""
    program = tmp_path_factory.mktemp("launch") / "ask"
    command = [nvcc(), "-std=c++17", "-arch=sm_90", "-cudart", "none", f"-I{CSRC}", "-o", str(program)]
    command += [str(CSRC / "launch.cu"), str(HERE / "runtime" / "ask.cu"), str(HERE / "runtime" / "fake_runtime.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    def run(*questions: tuple[int, int, int]) -> tuple[list[list[int]], str]:
        words = [",".join(map(str, question)) for question in questions]
        lines = subprocess.run([str(program), *words], capture_output=True, text=True, check=True).stdout.splitlines()
        return [list(map(int, line.split())) for line in lines[:-1]], lines[-1]

    return run


@pytest.mark.parametrize(
    ("device", "ptx", "major", "cluster"),
    [(9, 90, 9, 8), (10, 90, 9, 8), (10, 100, 10, 8), (9, 80, 8, 1), (12, 80, 8, 1), (8, 80, 8, 1)],
)
def test_clusters_are_planned_where_the_code_has_them(ask, device, ptx, major, cluster):
    answers, _ = ask((device, ptx, 0))
    assert answers == [[0, major, cluster, 16 if cluster > 1 else 0, 0]]


def test_a_failure_is_returned_and_the_next_call_asks_again(ask):
    answers, _ = ask((9, 90, 46), (9, 90, 0))
    assert answers == [[46, 0, 1, 0, 0], [0, 9, 8, 16, 0]]


def test_an_answer_is_kept(ask):
    answers, _ = ask((9, 90, 0), (8, 80, 46))
    assert answers[1] == answers[0]


def test_a_launch_that_fails_leaves_no_error_behind(ask):
    _, launch = ask()
    assert launch == "launch 701 0"
