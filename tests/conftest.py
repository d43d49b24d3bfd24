"""What the tests share: data that may be absent, the tolerance rule, one process-wide thread setting."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from simt import harness
from torch import Tensor

from fastreft import _native

SHARED = Path(__file__).resolve().parents[2] / "shared"
torch.set_num_threads(1)  # small problems; more threads only wait for each other
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# What a machine may lack that has just enough to check a GPU (benchmarks/gpu_check.sh), and the tests that need it.
NEEDS = {
    "datasets": ("test_data.py", "test_pyreft*.py", "pyreft/*"),
    "hypothesis": ("test_positions.py", "test_shapes.py"),
    "rich": ("test_demo.py",),
}
ABSENT = [name for name in NEEDS if importlib.util.find_spec(name) is None]
collect_ignore_glob = [pattern for name in ABSENT for pattern in NEEDS[name]]


def pytest_report_header() -> list[str]:
    return [f"NOT RUN, there is no {name} here: {' '.join(NEEDS[name])}" for name in ABSENT]


@pytest.fixture
def shared() -> Path:
    """Real data and oracles beside the checkout; a clone alone does not have them."""
    if not SHARED.exists():
        pytest.skip("no ../shared beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def runner(tmp_path_factory) -> Path:
    """The CUDA kernels as a program for the host (tests/simt), built once."""
    return harness.build(tmp_path_factory.mktemp("simt"))


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
        monkeypatch.setattr(_native, "quick", _native.Elsewhere)


def assert_as_good(got: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """The tolerance rule: error against fp64 <= 2 x the error of plain torch in the same dtype + one rounding.

    Errors are relative to each tensor's largest entry, and the largest of the tensors given counts: a sum of a few terms
    alone would make the rule a matter of luck.
    """

    def worst(tensors: list[Tensor]) -> float:
        return max(
            float((t.double() - e.double()).abs().max() / e.double().abs().max().clamp_min(1e-30))
            for t, e in zip(tensors, exact, strict=True)
        )

    assert [t.shape for t in got] == [e.shape for e in exact]
    assert all(bool(torch.isfinite(t).all()) for t in got)
    rounding = max(torch.finfo(t.dtype).eps for t in got)
    if got[0].dtype is torch.float64:  # nothing here is more exact than plain torch itself: its own roundings count
        rounding *= 64
    ours, theirs = worst(got), worst(plain)
    assert ours <= 2 * theirs + rounding, f"error {ours:.3g}, plain torch {theirs:.3g}, one rounding {rounding:.3g}"
