"""The names of the edits and of the activations that kernels have. Imports nothing, so that a command line may ask."""

from __future__ import annotations

METHODS = ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft")

# By Transformers' names (``ACT2FN``), those of one function together; their order is the numbering of `Act` in csrc/edit.h.
ACTIVATIONS = (
    ("linear",),
    ("relu",),
    ("gelu", "gelu_python"),
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"),
    ("silu", "swish"),
    ("sigmoid",),
    ("tanh",),
    ("relu2",),
    ("relu6",),
    ("leaky_relu",),
    ("quick_gelu",),
    ("mish",),
    ("laplace",),
    ("gelu_10",),
    ("hardswish",),
    ("sqrtsoftplus",),
)
FUSED_ACTIVATIONS = tuple(name for names in ACTIVATIONS for name in names)


def unknown_activation(act_fn: object) -> ValueError:
    """What to raise for an ``act_fn`` that is no activation's name."""
    given = repr(act_fn) if len(str(act_fn)) <= 60 else f"{str(act_fn)[:57]!r}..."
    return ValueError(f"act_fn {given} is neither one of {', '.join(FUSED_ACTIVATIONS)} nor in transformers' ACT2FN")
