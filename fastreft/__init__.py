"""fastreft: representation fine-tuning (ReFT) of language models at the speed of the frozen model.

The names are loaded when they are asked for: importing this takes no time, and a command line answers at once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from .joining import join

if TYPE_CHECKING:
    from . import functional, reference
    from .interventions import (
        ConsreftIntervention,
        DireftIntervention,
        LobireftIntervention,
        LoreftIntervention,
        NodireftIntervention,
        NoreftIntervention,
    )
    from .kinds import BiasIntervention, CsreftIntervention, RedIntervention, TorchIntervention, register_intervention
    from .optim import ReftAdamW, attach_retraction, param_groups, retract_model_
    from .optim.zero import ZeroRetraction
    from .tuner.config import ReftConfig
    from .tuner.model import get_reft_model
    from .tuner.rate import suggest_lr

__all__ = [
    "BiasIntervention",
    "ConsreftIntervention",
    "CsreftIntervention",
    "DireftIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "NodireftIntervention",
    "NoreftIntervention",
    "RedIntervention",
    "ReftAdamW",
    "ReftConfig",
    "TorchIntervention",
    "ZeroRetraction",
    "attach_retraction",
    "functional",
    "get_reft_model",
    "param_groups",
    "reference",
    "register_intervention",
    "retract_model_",
    "suggest_lr",
]

_ROOMS = {  # name -> the module that has it; interventions for all others
    "BiasIntervention": "kinds",
    "CsreftIntervention": "kinds",
    "RedIntervention": "kinds",
    "ReftAdamW": "optim",
    "ReftConfig": "tuner.config",
    "TorchIntervention": "kinds",
    "ZeroRetraction": "optim.zero",
    "attach_retraction": "optim",
    "get_reft_model": "tuner.model",
    "param_groups": "optim",
    "register_intervention": "kinds",
    "retract_model_": "optim",
    "suggest_lr": "tuner.rate",
}
_MODULES = ("causal", "concepts", "functional", "interventions", "optim", "pyreft", "reference")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "__version__":
        return importlib.metadata.version(__name__)
    if name not in __all__:
        raise AttributeError(f"module 'fastreft' has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_ROOMS.get(name, 'interventions')}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


join("peft", "fastreft.tuner.model")  # registers the method, whoever is imported first
join("pyvene", "fastreft.pyreft.guests")
