"""fastreft: representation fine-tuning (ReFT) of language models at the speed of the frozen model."""

from . import functional, reference
from .interventions import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from .optim.adamw import ReftAdamW, attach_retraction, param_groups
from .tuner.config import ReftConfig
from .tuner.model import get_reft_model

__all__ = [
    "ConsreftIntervention",
    "DireftIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "NodireftIntervention",
    "NoreftIntervention",
    "ReftAdamW",
    "ReftConfig",
    "attach_retraction",
    "functional",
    "get_reft_model",
    "param_groups",
    "reference",
]
