"""The build: what it links against, its switches, and what it says of itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastreft.ops import native as core

ROOT = Path(__file__).resolve().parents[2]
native = pytest.mark.skipif(core.core is None, reason="the native core is not built")


@native
def test_only_the_stable_abi_of_torch_is_used():
    """One build serves every torch from 2.10 on: no symbol of at::, c10:: or of libtorch_python may be needed."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm here")
    needed = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", core.core.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "torch_library_impl" in needed  # the listing is what it should be
    unstable = [
        line for line in needed.splitlines() if any(ns in line for ns in (" at::", " c10::", " torch::", "THP"))
    ]
    assert not unstable


@native
def test_the_quick_calls_are_there_for_the_torch_that_built_them():
    """Its build may fail without an error, for a torch to come; here it must not have."""
    import torch

    built_with = core.build_info()["torch_built_with"]
    if built_with == torch.__version__:
        assert core.quick is not core.Elsewhere
        assert core.build_info()["calls"] == "past torch's dispatcher"
    else:
        assert core.quick is core.Elsewhere
        assert built_with in core.build_info()["calls"]


def setup(**env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="there is no source tree here")
def test_switches_of_the_build():
    import torch

    pytest.importorskip("pybind11")
    wrong = setup(FASTREFT_BUILD_CUDA="yes")
    assert wrong.returncode != 0
    assert wrong.stderr.strip().endswith("FASTREFT_BUILD_CUDA is 'yes'; it must be auto, 1 or 0")
    if torch.version.cuda is None:
        insisted = setup(FASTREFT_BUILD_CUDA="1")
        assert insisted.returncode != 0
        assert "FASTREFT_BUILD_CUDA=1 but torch is a CPU build; install what is missing" in insisted.stderr
    assert setup(FASTREFT_BUILD_CUDA="0").stdout.strip().endswith("0.1.0")


@native
def test_build_info_says_which_why_and_what_would_change_it():
    info = core.build_info()
    assert info["backend"] == "native"
    assert info["cpu_isa"] in ("baseline", "avx2", "avx512", "avx512_bf16")
    assert info["devices"].split()[0] == "cpu"
    if "cuda" not in info["devices"]:
        assert info["cuda"].startswith("not built: ")
        assert "FASTREFT_BUILD_CUDA=1" in info["to change it"]
