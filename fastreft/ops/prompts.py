"""The native ops that look at a batch of prompts: which rows "f5+l5" means, and whether a sample shows no token."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native

_HOST = torch.device("cpu")
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _readable(t: Tensor | None) -> bool:
    """Can csrc/cpu/positions.cpp read it, or is there nothing to read?"""
    return t is None or (t.is_cpu and t.dtype in _INTEGERS)


def finds_rows(mask: Tensor | None, labels: Tensor | None, device: torch.device) -> bool:
    """Does the native op find the rows of such a batch? On a CPU, and outside a graph, where the compiler fuses torch's."""
    here = native.CPU and device == _HOST  # device.type costs more than a row
    here = here and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    return here and _readable(mask) and _readable(labels)


def prompt_rows(mask, labels, batch: int, length: int, first: int, last: int, pyreft_compat: bool) -> Tensor:
    """The rows of fN+lM in a padded batch (csrc/positions.h): int64 (batch, first + last), -1 = skip."""
    found = native.quick.prompt_rows(mask, labels, batch, length, first, last, pyreft_compat)
    if found is not NotImplemented:
        return found
    return torch.ops.fastreft.prompt_rows.default._op(mask, labels, batch, length, first, last, pyreft_compat)


def hidden_sample(mask: Tensor) -> int:
    """The first sample of which mask (B, S) shows no token; -1 where there is none."""
    found = native.quick.hidden_sample(mask)
    if found is not NotImplemented:
        return found
    if (
        native.CPU and _readable(mask) and type(mask) is Tensor
    ):  # a subclass may have no address, as fake tensors have none
        return native.core.hidden_sample(mask.data_ptr(), mask.element_size(), *mask.shape, *mask.stride())
    shown = mask.any(1)
    return -1 if bool(shown.all()) else int(shown.int().argmin())
