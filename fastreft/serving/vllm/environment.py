"""What the plugin is told by the environment, as vLLM starts its processes itself."""

from __future__ import annotations

import os

ADAPTERS = "FASTREFT_ADAPTERS"


def adapters() -> str | None:
    """The folder of adapters; None where none is named, and the plugin does nothing."""
    return os.environ.get(ADAPTERS) or None


def vectors() -> int:
    """The pool's vectors on the device, at each layer."""
    return int(os.environ.get("FASTREFT_VECTORS", "4096"))


def lines() -> int:
    """The pool's interventions on the device, at each layer."""
    return int(os.environ.get("FASTREFT_LINES", "1024"))


def most_r() -> int:
    """The largest rank that is served."""
    return int(os.environ.get("FASTREFT_MOST_R", "64"))
