"""What the plugin is told by the environment, as vLLM starts its processes itself."""

from __future__ import annotations

import os

PLUGIN = "fastreft"  # its name among vLLM's, as VLLM_PLUGINS has it
ADAPTERS, VECTORS, LINES, MOST_R = "FASTREFT_ADAPTERS", "FASTREFT_VECTORS", "FASTREFT_LINES", "FASTREFT_MOST_R"


def adapters() -> str | None:
    """The folder of adapters; None where none is named, and the plugin does nothing."""
    return os.environ.get(ADAPTERS) or None


def vectors() -> int:
    """The pool's vectors on the device, at each layer."""
    return _count(VECTORS, 4096)


def lines() -> int:
    """The pool's interventions on the device, at each layer."""
    return _count(LINES, 1024)


def most_r() -> int:
    """The largest rank that is served."""
    return _count(MOST_R, 64)


def _count(name: str, otherwise: int) -> int:
    text = os.environ.get(name) or str(otherwise)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name} is {text!r}; it must be a number, at least 1")
    return int(text)
