"""Which rooms of csrc/ know which: arrows run one way, and the kernels know neither torch nor Python."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
SOURCES = {".h", ".inl", ".cpp", ".cu", ".cuh"}

# What each room may include beside itself and the contract, the headers at the root ("").
ROOMS = {"": set(), "cpu": set(), "cuda": set(), "torch": {"cpu", "cuda"}, "quick": {"cpu", "cuda", "torch"}}
WITHOUT_TORCH = {"", "cpu", "cuda"}
TORCH = ("torch/", "ATen/", "c10/", "caffe2/", "pybind11/", "Python.h")


def room(file: str) -> str:
    return PurePosixPath(file).parts[0] if "/" in file else ""


def wrong_arrows(includes: dict[str, list[str]]) -> list[str]:
    """file of csrc -> what it includes, as written there; the includes that no room may have."""
    wrong = []
    for file, names in includes.items():
        here = room(file)
        if here not in ROOMS:
            wrong.append(f"{file}: there is no room {here}")
            continue
        for name in names:
            if name.startswith(TORCH):
                if here in WITHOUT_TORCH:
                    wrong.append(f"{file} -> {name}")
                continue
            # From the file's own folder, or from csrc itself.
            beside = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
            there = room(name) if room(name) in ROOMS else room(beside)
            if there in ROOMS and there not in {here, "", *ROOMS[here]}:
                wrong.append(f"{file} -> {name}")
    return wrong


def test_arrows_run_one_way():
    files = [path for path in CSRC.rglob("*") if path.suffix in SOURCES]
    if not files:
        pytest.skip("there is no source tree here")
    includes = {str(path.relative_to(CSRC).as_posix()): INCLUDE.findall(path.read_text()) for path in files}
    assert {room(file) for file in includes} == set(ROOMS)
    assert "policy.h" in includes["cuda/grid.h"] and "../edit.h" in includes["cpu/loops.h"]  # the listing is whole
    assert wrong_arrows(includes) == []


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("edit.h", "cpu/loops.h"),
        ("kernels.h", "cuda/policy.h"),
        ("edit.h", "torch/csrc/stable/tensor.h"),
        ("cpu/edit.cpp", "../cuda/policy.h"),
        ("cpu/edit.cpp", "../torch/tensors.h"),
        ("cpu/support.h", "ATen/Parallel.h"),
        ("cuda/policy.h", "../cpu/support.h"),
        ("cuda/launch.cu", "cpu/support.h"),
        ("cuda/launch.cu", "../quick/quick.h"),
        ("cuda/launch.h", "c10/cuda/CUDAStream.h"),
        ("torch/edit.cpp", "../quick/tensor.h"),
        ("other/edit.cpp", "../edit.h"),
    ],
)
def test_an_arrow_the_wrong_way_is_found(file, name):
    assert len(wrong_arrows({file: ["cstdint", name]})) == 1


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("kernels.h", "edit.h"),
        ("cpu/edit.cpp", "support.h"),
        ("cuda/edit_args.h", "../edit.h"),
        ("torch/bind_policy.h", "../cuda/policy.h"),
        ("torch/tensors.h", "torch/headeronly/core/ScalarType.h"),
        ("quick/step.cpp", "../torch/step_ops.h"),
    ],
)
def test_an_arrow_the_right_way_is_none(file, name):
    assert wrong_arrows({file: ["cstdint", name]}) == []
