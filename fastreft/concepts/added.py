"""An adapter that adds one vector to each of some layers' outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from ..tuner.config import ReftConfig
from ..tuner.loading import layers_of
from ..tuner.model import get_reft_model
from .given import check_vector


def with_vectors(model: nn.Module, vectors: Mapping[int, Tensor], positions: str, adapter_name: str) -> PeftModel:
    """``model`` with a ``bias`` adapter of these vectors, by layer, active beside the adapters that are.

    ``ValueError`` for a layer that there is not, another width or a name that is taken; the model is then as it was.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"adapter_name is {adapter_name!r}, which an adapter of this model has; give it another")
    by_name = {check_vector(base, layer, vector).name: vector for layer, vector in vectors.items()}
    config = ReftConfig(
        task_type="CAUSAL_LM" if getattr(base, "can_generate", lambda: False)() else None,
        intervention_type="bias",
        layers_to_transform=sorted(vectors),
        positions=positions,
    )
    if isinstance(model, PeftModel):
        active = model.active_adapters
        model.add_adapter(adapter_name, config)
        model.set_adapter([*active, adapter_name])  # type: ignore[arg-type]  # as this package has it
        made = model
    else:
        made = get_reft_model(model, config, adapter_name=adapter_name)
    for layer in layers_of(made):
        for edit in layer.interventions(adapter_name):
            vector: Any = edit.v
            vector.data.copy_(by_name[layer.name])
    return made
