"""pyreft's configuration: a list of representations, each an intervention and the place it edits."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from ..interventions import Intervention
from ..models.blocks import hidden_size
from ..ops.groups import of_pyvene


class TaskType(str, enum.Enum):
    """pyreft's two kinds of task."""

    SEQ_CLS = "SEQ_CLS"
    CAUSAL_LM = "CAUSAL_LM"


@dataclass(frozen=True)
class Representation:
    """One intervention: where it is and what it does. ``subspace_partition``: the groups of
    its rows that ``subspaces`` count, see :func:`fastreft.ops.groups.of_pyvene`. The fields after it must be left alone."""

    layer: int = 0
    component: str = "block_output"
    unit: str = "pos"
    max_number_of_units: int = 1
    low_rank_dimension: int | None = None
    intervention_type: type[Intervention] | None = None
    intervention: Intervention | None = None
    subspace_partition: Any = None
    group_key: Any = None
    intervention_link_key: None = None
    moe_key: None = None
    source_representation: None = None
    hidden_source_representation: None = None
    latent_dim: None = None


_NAMES = [field.name for field in fields(Representation)]
_UNSUPPORTED = ("intervention_link_key", "moe_key", "source_representation", "latent_dim")


class ReftConfig:
    """``ReftConfig(representations=...)``: a dict, or a list of dicts (or of pyreft's positional lists).

    Each has an ``intervention``, one of the six modules, or an ``intervention_type``, its class, which is then built for the
    model with ``low_rank_dimension``. ``ValueError`` or ``TypeError`` naming the field for what is not supported.
    """

    def __init__(self, representations: Any, **unused: Any):
        given = representations if isinstance(representations, list) else [representations]
        if not given:
            raise ValueError("representations is empty; it must list at least one intervention")
        if unused.pop("mode", "parallel") != "parallel":
            raise ValueError("mode must be 'parallel': all interventions act in one forward")
        self.representations = [_parse(representation) for representation in given]

    def built(self, model: nn.Module) -> list[Representation]:
        """The representations with every intervention made."""
        made = []
        for i, representation in enumerate(self.representations):
            if representation.intervention is None:
                rank = representation.low_rank_dimension
                if representation.intervention_type is None or rank is None:
                    raise ValueError(
                        f"representations[{i}] has no intervention; give one, or an intervention_type and a low_rank_dimension"
                    )
                new = representation.intervention_type(embed_dim=hidden_size(model), low_rank_dimension=rank)
                representation = replace(representation, intervention=new)
            if representation.subspace_partition is not None:
                held: Any = representation.intervention
                held.partition = of_pyvene(representation.subspace_partition, held.r)
            made.append(representation)
        return made


def _parse(given: Any) -> Representation:
    if isinstance(given, Representation):
        return given
    if isinstance(given, (list, tuple)):
        given = dict(zip(_NAMES, given, strict=False))
    if not isinstance(given, Mapping):
        raise TypeError(f"a representation is a {type(given).__name__}; it must be a dict")
    unknown = set(given) - set(_NAMES)
    if unknown:
        raise ValueError(f"a representation has the unknown field {min(unknown)!r}; it may have {', '.join(_NAMES)}")
    for name in _UNSUPPORTED:
        if given.get(name) is not None:
            raise ValueError(f"{name} is not supported; an intervention edits all of its dimensions, with no source")
    made = Representation(**given)
    if made.unit != "pos" or made.max_number_of_units != 1:
        raise ValueError(f"unit is {made.unit!r}; it must be 'pos' with max_number_of_units 1: heads are not supported")
    if made.intervention is not None and not isinstance(made.intervention, Intervention):
        raise TypeError(
            f"intervention is a {type(made.intervention).__module__}.{type(made.intervention).__name__}; it must be one of "
            "fastreft.pyreft's six, such as fastreft.pyreft.LoreftIntervention"
        )
    its_class = made.intervention_type
    if its_class is not None and not (isinstance(its_class, type) and issubclass(its_class, Intervention)):
        raise TypeError(f"intervention_type is {its_class!r}; it must be one of fastreft.pyreft's six classes")
    return made
