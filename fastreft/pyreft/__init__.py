"""pyreft's names over fastreft: ``import fastreft.pyreft as pyreft``. Needs neither pyreft nor pyvene.

Also here: :func:`load` and :func:`save`, pyreft's checkpoints as PEFT adapters of fastreft and back.
"""

from typing import Any

from ..interventions import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from .config import ReftConfig, TaskType
from .convert import load, save
from .data import (
    ReftDataCollator,
    get_intervention_locations,
    make_last_position_supervised_data_module,
    make_multiple_position_supervised_data_module,
    parse_positions,
)
from .dataset import (
    ReftClassificationDataset,
    ReftDataset,
    ReftGenerationDataset,
    ReftRawDataset,
    ReftSupervisedDataset,
)
from .format import CheckpointError
from .model import ReftModel, get_reft_model
from .trainer import (
    ReftTrainer,
    ReftTrainerForCausalLM,
    ReftTrainerForCausalLMDistributed,
    ReftTrainerForSequenceClassification,
)

__all__ = [
    "CheckpointError",
    "ConsreftIntervention",
    "DireftIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "NodireftIntervention",
    "NoreftIntervention",
    "ReftClassificationDataset",
    "ReftConfig",
    "ReftDataCollator",
    "ReftDataset",
    "ReftGenerationDataset",
    "ReftModel",
    "ReftRawDataset",
    "ReftSupervisedDataset",
    "ReftTrainer",
    "ReftTrainerForCausalLM",
    "ReftTrainerForCausalLMDistributed",
    "ReftTrainerForSequenceClassification",
    "TaskType",
    "get_intervention_locations",
    "get_reft_model",
    "load",
    "make_last_position_supervised_data_module",
    "make_multiple_position_supervised_data_module",
    "parse_positions",
    "save",
]

# What pyreft has and this has not, and what to use in its place.
_ELSEWHERE = {
    "ReftPreferenceDataset": "train with TRL's trainers on a model of fastreft.get_reft_model",
    "ReftRewardDataset": "train with TRL's RewardTrainer on a classifier with fastreft.ReftConfig(task_type='SEQ_CLS')",
    "ReftRewardCollator": "train with TRL's RewardTrainer, which collates pairs itself",
    "ReftType": "give fastreft.ReftConfig(intervention_type='loreft') or another of the six",
    "IntervenableModel": "use fastreft.pyreft.ReftModel; other interventions than the six need pyvene itself",
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        raise AttributeError(f"fastreft.pyreft has no {name}: {_ELSEWHERE[name]}")
    raise AttributeError(f"module 'fastreft.pyreft' has no attribute {name!r}")
