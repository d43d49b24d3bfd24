"""What the tests share: data that may be absent, the tolerance rule, one process-wide thread setting."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from common import DEVICES, SHARED
from filelock import FileLock
from simt import harness

from fastreft.ops import native
from fastreft.settings import ReftSettings

torch.set_num_threads(1)  # small problems; more threads only wait for each other

# What a machine may lack that has just enough to check a GPU (benchmarks/gpu_check.sh), and the tests that need it.
NEEDS = {
    "datasets": (
        "tasks/test_data.py",
        "tasks/test_tagging.py",
        "tasks/sets/test_memorisation.py",
        "tasks/test_tasks.py",
        "tasks/test_fits.py",
        "pyreft/*",
    ),
    "hypothesis": ("plan/test_positions.py", "ops/test_shapes.py"),
    "rich": ("tasks/test_demo.py",),
}
ABSENT = [name for name in NEEDS if importlib.util.find_spec(name) is None]
collect_ignore_glob = [pattern for name in ABSENT for pattern in NEEDS[name]]


def pytest_report_header() -> list[str]:
    return [f"NOT RUN, there is no {name} here: {' '.join(NEEDS[name])}" for name in ABSENT]


LONG = ("cuda/", "test_types.py", "tasks/test_processes.py", "attack/", "tasks/test_demo.py", "ops/test_build.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long goes first: of what is left at the end there is then enough for every process."""
    items.sort(key=lambda item: not any(part in item.nodeid for part in LONG))


@pytest.fixture
def shared() -> Path:
    """Real data and oracles beside the checkout; a clone alone does not have them."""
    if not SHARED.exists():
        pytest.skip("no ../shared beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def fresh_adapters_edit(request, monkeypatch):
    """Adapters whose start nobody names start at random, so that a test sees their edits without training them first; a user's
    start as the identity. ``default_start`` leaves that."""
    if request.node.get_closest_marker("default_start") is None:
        monkeypatch.setattr(ReftSettings, "start", lambda self: self.init_weights or "random")


@pytest.fixture(scope="session")
def runner(tmp_path_factory) -> Path:
    """The CUDA kernels as a program for the host (tests/cuda/simt), built once by whichever of the processes that share the
    tests is the first to ask."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "simt.lock"):
        built = folder / "simt" / "runner"
        return built if built.exists() else harness.build(built.parent)


@pytest.fixture(params=DEVICES)
def everything_on(request):
    """What a test makes without naming a device is made on each device in turn."""
    if request.param == "cpu":
        yield
    else:
        with torch.device(request.param):
            yield


@pytest.fixture(params=["quick", "dispatched"])
def calls(request, monkeypatch):
    """The same past torch's dispatcher, as csrc/quick/ does it, and through it, as without that."""
    if request.param == "dispatched":
        monkeypatch.setattr(native, "quick", native.Elsewhere)
