"""An adapter that adds one vector to each of some layers' outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from ..tuner.config import ReftConfig
from ..tuner.loading import layers_of
from ..tuner.model import get_reft_model


def with_vectors(model: nn.Module, vectors: Mapping[int, Tensor], positions: str, adapter_name: str) -> PeftModel:
    """``model`` with a ``bias`` adapter of these vectors, by layer."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = ReftConfig(
        task_type="CAUSAL_LM" if getattr(base, "can_generate", lambda: False)() else None,
        intervention_type="bias",
        layers_to_transform=sorted(vectors),
        positions=positions,
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        made = model
    else:
        made = get_reft_model(model, config, adapter_name=adapter_name)
    for layer in layers_of(made):
        for edit in layer.interventions(adapter_name):
            vector: Any = edit.v
            vector.data.copy_(vectors[int(layer.name.rpartition(".")[2])])
    return made
