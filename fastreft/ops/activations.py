"""The activations that run inside the fused edit, by their Transformers name (``ACT2FN``).

``find(act_fn)`` gives the number the kernels know (``Act`` in ``csrc/edit.h``) and the same function in torch. Activations
with parameters of their own (prelu, xielu) and ones we do not know are callables here, and stay outside the fused path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .names import ACTIVATIONS, FUSED_ACTIVATIONS

Function = Callable[[Tensor], Tensor]
ActFn = str | Function | None


class Activation(NamedTuple):
    """What the kernels know an activation by, None where they do not; and the torch function, None for the identity."""

    number: int | None
    function: Function | None


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def _identity(x: Tensor) -> Tensor:
    return x


# In the order of ACTIVATIONS.
_FUNCTIONS: tuple[Function, ...] = (
    _identity,
    F.relu,
    F.gelu,
    _gelu_tanh,
    F.silu,
    torch.sigmoid,
    torch.tanh,
    lambda x: F.relu(x).square(),
    F.relu6,
    F.leaky_relu,
    _quick_gelu,
    F.mish,
    _laplace,
    lambda x: F.gelu(x).clamp(-10, 10),
    F.hardswish,
    lambda x: F.softplus(x).sqrt(),
)
_KNOWN: dict[str | None, Activation] = {
    name: Activation(number, function if number else None)
    for number, (names, function) in enumerate(zip(ACTIVATIONS, _FUNCTIONS, strict=True))
    for name in names
}
_KNOWN[None] = _KNOWN["linear"]


def find(act_fn: ActFn) -> Activation:
    """The :class:`Activation` of None, a name of :data:`FUSED_ACTIVATIONS` or a callable; ``ValueError`` for another name."""
    if act_fn is not None and not isinstance(act_fn, str):
        return Activation(None, act_fn)
    found = _KNOWN.get(act_fn)
    if found is None:
        raise ValueError(f"act_fn {act_fn!r} is not one of {', '.join(FUSED_ACTIVATIONS)}")
    return found


def numbered(number: int) -> Activation:
    """The :class:`Activation` that the kernels know by a number."""
    return Activation(number, _FUNCTIONS[number] if number else None)


def is_fused(act_fn: str | None) -> bool:
    """Do the kernels have the activation of this name?"""
    return act_fn in _KNOWN


def torch_fn(act_fn: str | None) -> Function:
    """The activation as a torch function; ``ValueError`` as :func:`find`."""
    return find(act_fn).function or _identity
