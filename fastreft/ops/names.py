"""The names of the edits and of the activations that kernels have. Imports nothing, so that a command line may ask."""

from __future__ import annotations

METHODS = ("loreft", "noreft", "consreft", "lobireft", "direft", "nodireft")
LATER = ("bias", "red", "csreft")  # methods since the paper, in fastreft/kinds; each starts by changing nothing
OWN: dict[str, bool] = {}  # those of a user's, by fastreft.register_intervention, and whether they start so
WHOLE = {"bias", "red"}  # those that a configuration's groups of rows are nothing to
STARTS = ("identity", "random")

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


# Activations other than 0 at 0.
_NOT_ZERO_AT_ZERO = ("sigmoid", "laplace", "sqrtsoftplus", "xielu")


def edits() -> tuple[str, ...]:
    """Every edit that a configuration may name."""
    return (*METHODS, *LATER, *OWN)


def may_be_identity(method: str, act_fn: str | None) -> bool:
    """Whether weights exist with which an edit changes nothing, whatever the hidden state.

    LoReFT and NoReFT: act(V h + b) = P h for V = P and b = 0, of a linear act alone. DiReFT and NodiReFT: V = 0, b = 0 and
    act(0) = 0, asked here of the activations that kernels have. LobiReFT: b = 0. ConsReFT: never. Others: as they say.
    """
    if method in LATER or method in OWN:
        return OWN.get(method, True)
    linear = act_fn in (None, "linear")
    return {
        "loreft": linear,
        "noreft": linear,
        "direft": act_fn not in _NOT_ZERO_AT_ZERO,
        "nodireft": act_fn not in _NOT_ZERO_AT_ZERO,
        "lobireft": True,
    }.get(method, False)


def unknown_activation(act_fn: object) -> ValueError:
    """What to raise for an ``act_fn`` that is no activation's name."""
    given = repr(act_fn) if len(str(act_fn)) <= 60 else f"{str(act_fn)[:57]!r}..."
    return ValueError(f"act_fn {given} is neither one of {', '.join(FUSED_ACTIVATIONS)} nor in transformers' ACT2FN")
