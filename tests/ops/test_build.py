"""The build: what it links against, its switches, and what it says of itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import forked
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

    if "FASTREFT_QUICK" in core.build_info()["calls"]:
        pytest.skip("it is switched off")
    built_with = core.build_info()["torch_built_with"]
    if built_with == torch.__version__:
        assert core.quick is not core.Elsewhere
        assert core.build_info()["calls"] == "past torch's dispatcher"
    else:
        assert core.quick is core.Elsewhere
        assert built_with in core.build_info()["calls"]


def python(code: str, *argv: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which has torch and nothing of ours."""
    return forked.run(f"import sys; assert 'fastreft' not in sys.modules\n{code}", *argv, cwd=cwd, **env)


def setup(*argv: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    run = "import runpy; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    return python(run, *argv, cwd=cwd, **env)


source_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="there is no source tree here")


@source_tree
def test_switches_of_the_build():
    import torch

    pytest.importorskip("pybind11")
    for name in ("FASTREFT_BUILD_CUDA", "FASTREFT_QUICK"):
        wrong = setup("--version", **{name: "yes"})
        assert wrong.returncode != 0
        assert wrong.stderr.strip().endswith(f"{name} is 'yes'; it must be auto, 1 or 0")
    if torch.version.cuda is None:
        insisted = setup("--version", FASTREFT_BUILD_CUDA="1")
        assert insisted.returncode != 0
        assert "FASTREFT_BUILD_CUDA=1 but torch is a CPU build; install what is missing" in insisted.stderr
    assert setup("--version", FASTREFT_BUILD_CUDA="0").stdout.strip().endswith("0.1.0")


@native
def test_build_info_says_which_why_and_what_would_change_it():
    info = core.build_info()
    assert info["backend"] == "native"
    assert info["cpu_isa"] in ("baseline", "avx2", "avx512", "avx512_bf16")
    assert info["devices"].split()[0] == "cpu"
    if "cuda" not in info["devices"]:
        assert info["cuda"].startswith("not built: ")
        assert "FASTREFT_BUILD_CUDA=1" in info["to change it"]


# ---- fastreft._quick: built, left out, insisted on -------------------------------------------------------------------

MODULE = '#include <Python.h>\nstatic PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{0}"}};\n'
MODULE += "PyMODINIT_FUNC PyInit_{0}() {{ return PyModule_Create(&module); }}\n"


def build(folder: Path, quick: str, asked: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Builds a small tree with this setup.py, in which an older _quick lies; what was said, and the modules then there."""
    pytest.importorskip("pybind11")
    sources = {"cpu/positions": "", "torch/module": MODULE.format("_C"), "quick/module": quick}
    for name, text in sources.items():
        path = folder / "csrc" / f"{name}.cpp"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (folder / "fastreft").mkdir()
    (folder / "fastreft" / "__init__.py").touch()
    (folder / "fastreft" / "_quick.older.so").touch()
    shutil.copy(ROOT / "setup.py", folder)
    switches = {"FASTREFT_BUILD_CUDA": "0", "FASTREFT_QUICK": asked}
    done = setup("build_ext", "--inplace", cwd=folder, **switches)
    return done, {path.name.split(".")[0] for path in (folder / "fastreft").glob("*.so")}


WELL, ILL = MODULE.format("_quick"), "#error there is something that this torch does not have"


@source_tree
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("quick", "asked", "builds", "there"),
    [
        (WELL, "", True, {"_C", "_quick"}),
        (ILL, "auto", True, {"_C"}),
        (ILL, "0", True, {"_C"}),
        (WELL, "0", True, {"_C"}),
        (WELL, "1", True, {"_C", "_quick"}),
        (ILL, "1", False, None),
    ],
    ids=["well", "ill", "ill and left out", "left out", "insisted on", "ill and insisted on"],
)
def test_a_build_with_and_without_the_quick_calls(quick, asked, builds, there, tmp_path):
    done, modules = build(tmp_path, quick, asked)
    assert (done.returncode == 0) == builds, done.stdout + done.stderr
    if builds:
        assert modules == there
        left = tmp_path / "fastreft" / "_quick.older.so"
        assert left.exists() == (quick is WELL and asked != "0")  # one that was built comes before it
    else:
        assert "something that this torch does not have" in done.stdout + done.stderr


def calls(**env: str) -> str:
    """How calls go in a process with this environment, or the last line of its error."""
    ask = "from fastreft.ops import native; print(native.build_info()['calls'])"
    done = python(ask, **{"FASTREFT_BACKEND": "", "FASTREFT_QUICK": "", **env})
    return (done.stdout or done.stderr).strip().rpartition("\n")[2]


@native
def test_switch_of_the_quick_calls():
    refused = "ImportError: FASTREFT_QUICK=1, but calls cannot go past torch's dispatcher: "
    assert calls(FASTREFT_QUICK="0") == "through torch's dispatcher: FASTREFT_QUICK is 0"
    assert calls(FASTREFT_QUICK="yes") == "ImportError: FASTREFT_QUICK is 'yes'; it must be auto, 1 or 0"
    assert calls(FASTREFT_QUICK="1", FASTREFT_BACKEND="reference") == f"{refused}FASTREFT_BACKEND is reference"
    usual = calls()
    if usual == "past torch's dispatcher":
        assert calls(FASTREFT_QUICK="auto") == calls(FASTREFT_QUICK="1") == usual
    else:
        assert calls(FASTREFT_QUICK="1") == refused + usual.partition(": ")[2]


def test_what_is_said_of_a_build_without_the_quick_calls(monkeypatch):
    import torch

    def built(asked: str, version: str) -> None:
        info = {"devices": "cpu", "quick_asked": asked, "torch_built_with": version}
        monkeypatch.setattr(core, "core", SimpleNamespace(build_info=lambda: info))

    monkeypatch.setattr(core, "CPU", True)
    monkeypatch.setattr(core, "QUICK", "auto")
    for asked, version, why in (
        ("0", torch.__version__, "FASTREFT_QUICK was 0 when fastreft was built"),
        ("auto", "1.0", f"built with torch 1.0; reinstall for {torch.__version__}"),
    ):
        built(asked, version)
        assert core._find_quick() == (core.Elsewhere, f"through torch's dispatcher, slower: {why}")
        monkeypatch.setattr(core, "QUICK", "1")
        with pytest.raises(ImportError, match=f"^FASTREFT_QUICK=1, but .*: {re.escape(why)}$"):
            core._find_quick()
        monkeypatch.setattr(core, "QUICK", "auto")


# ---- the CUDA toolkit ------------------------------------------------------------------------------------------------

WITH_CUDA = """
import runpy, setuptools, torch
torch.version.cuda, torch.cuda._is_compiled, torch.cuda.is_available = "13.0", lambda: True, lambda: False
setuptools.setup = lambda ext_modules, **_: print(*ext_modules[0].libraries)
runpy.run_path("setup.py")
print(torch.utils.cpp_extension.CUDA_HOME)
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@source_tree
@pytest.mark.skipif(os.name != "posix", reason="nvcc is a shell script here")
@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("unversioned", [True, False])
def test_the_toolkit_is_that_of_the_nvcc_on_path(says, unversioned, monkeypatch, tmp_path):
    """Where a script calls nvcc; and cudart is linked under the name that is there."""
    pytest.importorskip("pybind11")
    home = tmp_path / "toolkit"
    program(home / "bin" / "nvcc", f"echo '#$ TOP={home}/bin/..' >&2" if says else "exit 1")
    program(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    libraries = (home if says else tmp_path) / "lib64"
    libraries.mkdir()
    for name in ("libcudart.so.13", *(["libcudart.so"] if unversioned else [])):
        (libraries / name).touch()
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    done = python(WITH_CUDA, FASTREFT_BUILD_CUDA="1", PATH=path)
    assert done.returncode == 0, done.stderr
    linked, found = done.stdout.strip().split("\n")
    assert Path(found) == (home if says else tmp_path)  # torch's guess where nvcc does not say
    assert ("cudart" if unversioned else ":libcudart.so.13") in linked.split()
