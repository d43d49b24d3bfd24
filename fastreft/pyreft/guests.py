"""Our interventions as guests in pyvene's models, and so in pyreft's, which ask ``isinstance`` of pyvene's own classes.

Imports pyvene, and is imported once pyvene is (:mod:`fastreft.joining`). It then takes its place as the ``host`` of
:mod:`fastreft.interventions`: when pyvene has taken an intervention, which it does by setting ``use_fast``, that changes to a
class that is ours first and pyvene's after.
"""

from __future__ import annotations

from typing import Any

import pyvene
import torch
from torch import Tensor, nn

from .. import interventions, optim
from ..interventions import Intervention
from . import format

_HOSTS = (pyvene.SourcelessIntervention, pyvene.TrainableIntervention, pyvene.DistributedRepresentationIntervention)


class _Guest:
    """What pyvene asks of an intervention and ours do not have."""

    use_fast = False
    subspace_partition = None
    source_representation = None

    def __init__(self, **kwargs: Any):
        # pyvene makes one to load a file into, and may know neither its rank nor its width; the file does.
        rank = kwargs.pop("low_rank_dimension", None) or 1
        width = kwargs.pop("embed_dim", None) or rank
        super().__init__(embed_dim=int(width), low_rank_dimension=rank, **kwargs)  # type: ignore[call-arg]
        self._settle()

    def _settle(self) -> None:
        self.trainable = self.is_source_constant = self.keep_last_dim = self.is_repr_distributed = True
        self.interchange_dim = torch.tensor(self.embed_dim)  # type: ignore[attr-defined]
        optim.guard_optimizers()

    @torch.no_grad()
    def load_state_dict(self: Any, state_dict: dict[str, Tensor], *_: Any, **__: Any) -> None:
        """Our tensors or those of pyreft's class of this name; the rank and the width become the file's."""
        own = {name: p.dtype for name, p in self.named_parameters(recurse=False) if name != "R"}
        state = {name: value for name, value in state_dict.items() if not name.startswith("act.")}
        read = format.to_intervention(
            state, "the state_dict", format.kind_of(self), dtype=next(iter(own.values())), act_fn=self.act_fn
        )
        self.embed_dim, self.r = read.embed_dim, read.r
        for name, new in read.named_parameters(recurse=False):
            held = self._parameters.get(name)
            if held is not None and held.shape == new.shape:
                held.copy_(new)
            else:
                device = next(self.parameters()).device
                self.register_parameter(name, nn.Parameter(new.detach().to(device)))
        if self.act is not None:
            self.act.load_state_dict({name[4:]: value for name, value in state_dict.items() if name not in state})


def adopt(intervention: Intervention) -> None:
    """Make an intervention one of pyvene's, too, in place."""
    taken: Any = intervention
    taken.__class__ = _guest(type(intervention))
    taken._settle()


def _guest(of: type[Intervention]) -> type[Any]:
    """The guest of one of the six classes: pyvene saves its name, so it is a name of this module."""
    found = globals().get(of.__name__)
    if found is None or not issubclass(found, of):
        raise TypeError(
            f"{of.__name__} cannot be used within pyvene; it must be one of fastreft's six interventions itself"
        )
    return found


for _name, _class in vars(interventions).items():
    if isinstance(_class, type) and issubclass(_class, Intervention) and _class is not Intervention:
        globals()[_name] = type(_name, (_Guest, _class, *_HOSTS), {"__module__": __name__, "__doc__": _class.__doc__})

interventions.host = adopt
