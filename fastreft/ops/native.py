"""The native core: loading it, and the choice between it and plain torch.

FASTREFT_BACKEND chooses at run time: ``native`` (the default where the extension is there) or ``reference`` (plain
torch everywhere). FASTREFT_QUICK chooses how the native ops are called: ``0`` through torch's dispatcher, ``1`` past it
or not at all, ``auto`` (the default) past it where the extension for that serves this torch.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor

core: Any = None  # csrc/, one build for every torch


class Elsewhere:
    """Stands in for csrc/quick/, which serves the torch that it was built with alone: others must do the work."""

    @staticmethod
    def edit_rows_(*_arguments: Any) -> Any:
        return NotImplemented

    prompt_rows = hidden_sample = step_ = edit_rows_


_core_error = ""
try:
    from .. import _C as core  # type: ignore[attr-defined,no-redef]
except ImportError as error:  # a source tree without a build, or a torch too old for the extension
    _core_error = str(error)

BACKEND: str = os.environ.get("FASTREFT_BACKEND") or ("native" if core is not None else "reference")
if BACKEND not in ("native", "reference"):
    raise ImportError(f"FASTREFT_BACKEND is {BACKEND!r}; it must be native or reference")
if BACKEND == "native" and core is None:
    raise ImportError(f"FASTREFT_BACKEND=native, but fastreft's extension does not load: {_core_error}")

CPU: bool = BACKEND == "native"
CUDA: bool = CPU and "cuda" in core.build_info()["devices"].split()

QUICK: str = os.environ.get("FASTREFT_QUICK", "").strip().lower() or "auto"
if QUICK not in ("auto", "1", "0"):
    raise ImportError(f"FASTREFT_QUICK is {QUICK!r}; it must be auto, 1 or 0")


def _find_quick() -> tuple[Any, str]:
    """csrc/quick/ or its stand-in, and how calls go with it."""
    if QUICK == "0":
        return Elsewhere, "through torch's dispatcher: FASTREFT_QUICK is 0"
    why = "FASTREFT_BACKEND is reference"
    if CPU:
        built = core.build_info()
        why = f"built with torch {built['torch_built_with']}; reinstall for {torch.__version__}"
        if built["quick_asked"] == "0":
            why = "FASTREFT_QUICK was 0 when fastreft was built"
        elif built["torch_built_with"] == torch.__version__:
            try:
                return importlib.import_module("fastreft._quick"), "past torch's dispatcher"
            except ImportError as error:
                why = str(error)
    if QUICK == "1":
        raise ImportError(f"FASTREFT_QUICK=1, but calls cannot go past torch's dispatcher: {why}")
    return Elsewhere, f"through torch's dispatcher, slower: {why}"


quick, _calls = _find_quick()


def runs(t: Tensor) -> bool:
    """Do the native ops take this tensor?"""
    return (CPU and t.is_cpu) or (CUDA and t.is_cuda)


def build_info() -> dict[str, str]:
    """How the native core was built, which backend is in use, why, and what would change it, as strings."""
    info = {"backend": BACKEND}
    if core is None:
        info["native core"] = f"not loaded: {_core_error}"
        info["to change it"] = "build it with 'pip install --no-build-isolation .' where torch and a C++ compiler are"
        return info
    info |= core.build_info()
    del info["quick_asked"]  # "calls" says what came of it
    if CPU:
        info["calls"] = _calls
    change = "FASTREFT_BACKEND=reference runs plain torch" if BACKEND == "native" else "unset FASTREFT_BACKEND"
    if "cuda" not in info["devices"].split():
        change += "; a CUDA build needs nvcc, a CUDA torch and a reinstall (FASTREFT_BUILD_CUDA=1 insists on it)"
    info["to change it"] = change
    return info
