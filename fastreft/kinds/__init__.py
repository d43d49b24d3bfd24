"""Every edit that a configuration may name: the paper's six, those since (a file each), and a user's own.

@fastreft.register_intervention("scale")              # ReftConfig(intervention_type="scale")
class Scale(fastreft.TorchIntervention):
    def build(self, dtype, add_bias):
        self.s = torch.nn.Parameter(torch.empty(self.embed_dim, dtype=dtype))

    def reset_parameters(self):
        torch.nn.init.ones_(self.s)

    def formula(self, h):
        return self.s * h
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..interventions import INTERVENTIONS, Intervention
from ..ops import names
from .bias import BiasIntervention
from .csreft import CsreftIntervention
from .formula import TorchIntervention
from .red import RedIntervention

__all__ = [
    "KINDS",
    "BiasIntervention",
    "CsreftIntervention",
    "RedIntervention",
    "TorchIntervention",
    "register_intervention",
]

_LATER = (BiasIntervention, RedIntervention, CsreftIntervention)
KINDS: dict[str, type[Intervention]] = {**INTERVENTIONS, **{made.method: made for made in _LATER}}

Made = TypeVar("Made", bound=type[Intervention])


def register_intervention(name: str, *, identity: bool = False) -> Callable[[Made], Made]:
    """A decorator that makes a class the edit ``name`` of a configuration, for training, saving, loading and serving.

    The class is a :class:`TorchIntervention`, which says ``formula``, or an :class:`Intervention`, which says ``weights``: the
    (U, V, P, b, c) of h + U^T (act(V h + b) - P h - c), which the kernels edit with. ``identity``: its start changes nothing.
    Whoever loads such an adapter imports the class's module first. A name of its own that is registered again is replaced.
    ``ValueError`` for a name that is fastreft's, or no name in Python; ``TypeError`` for another class.
    """
    if not isinstance(name, str) or not name.isidentifier() or name in (*names.METHODS, *names.LATER):
        raise ValueError(
            f"name is {name!r}; it must be a word as names are in Python, and none of fastreft's own edits"
        )

    def add(made: Made) -> Made:
        if not isinstance(made, type) or not issubclass(made, Intervention):
            raise TypeError(
                f"{made!r} is no subclass of fastreft.TorchIntervention or of fastreft.interventions.Intervention"
            )
        made.method = name
        names.OWN[name], KINDS[name] = identity, made
        names.WHOLE.discard(name)
        if not made.chosen and not issubclass(made, CsreftIntervention):  # which routes by them
            names.WHOLE.add(name)
        return made

    return add
