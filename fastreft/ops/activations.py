"""The activations that run inside the fused edit, by their Transformers name (``ACT2FN``).

``native_id(name)`` gives the number the kernels know (``Act`` in ``csrc/edit.h``), ``torch_fn(name)`` the same
function in torch. Activations with parameters of their own (prelu, xielu) and ones we do not know stay
outside the fused path: :func:`module` builds them from Transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

Activation = Callable[[torch.Tensor], torch.Tensor]


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _laplace(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


# The order is the numbering of `Act` in csrc/edit.h.
_FUNCTIONS: tuple[tuple[tuple[str, ...], Activation], ...] = (
    (("linear",), _identity),
    (("relu",), F.relu),
    (("gelu", "gelu_python"), F.gelu),
    (("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), _gelu_tanh),
    (("silu", "swish"), F.silu),
    (("sigmoid",), torch.sigmoid),
    (("tanh",), torch.tanh),
    (("relu2",), lambda x: F.relu(x).square()),
    (("relu6",), F.relu6),
    (("leaky_relu",), F.leaky_relu),
    (("quick_gelu",), _quick_gelu),
    (("mish",), F.mish),
    (("laplace",), _laplace),
    (("gelu_10",), lambda x: F.gelu(x).clamp(-10, 10)),
    (("hardswish",), F.hardswish),
    (("sqrtsoftplus",), lambda x: F.softplus(x).sqrt()),
)
_ID = {name: number for number, (names, _) in enumerate(_FUNCTIONS) for name in names}
NAMES = tuple(_ID)


def native_id(act_fn: str | None) -> int | None:
    """The kernels' number of a Transformers activation name; None where it has no fused form."""
    return _ID.get(act_fn or "linear")


def torch_fn(act_fn: str | None) -> Activation:
    """The activation as a torch function; ``ValueError`` for a name outside :data:`NAMES`."""
    number = native_id(act_fn)
    if number is None:
        raise ValueError(f"act_fn {act_fn!r} is not one of {', '.join(NAMES)}")
    return _FUNCTIONS[number][1]


def module(act_fn: str) -> torch.nn.Module:
    """An activation of Transformers' ``ACT2FN`` that has no fused form, as a module (it may hold parameters)."""
    try:
        from transformers.activations import ACT2FN
    except ImportError as error:
        raise ValueError(f"act_fn {act_fn!r} is not one of {', '.join(NAMES)}") from error
    if act_fn not in ACT2FN:
        raise ValueError(f"act_fn {act_fn!r} is neither one of {', '.join(NAMES)} nor in transformers' ACT2FN")
    return ACT2FN[act_fn]
