"""What a ReFT adapter hangs on a module of the model: its interventions, and the hooks that apply them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..interventions import Intervention
from ..kinds import KINDS
from ..models import blocks, layouts
from ..models.layouts import Layout
from ..ops.edit import NEW
from ..ops.groups import Groups
from ..plan import hooks
from ..plan.forward import Plan, Shared
from ..plan.spec import Positions, Tied, parse
from . import subspaces
from .config import ReftConfig

# The attributes of a ReftLayer that hold interventions, or, with one for each position, a list of them in the first. The
# second is only filled where prefix and suffix have one each.
_GROUPS = ("reft_edit", "reft_suffix")
NO_MERGE = "an edit at positions has no weight form, so it cannot be merged; save the adapter instead"


class Spec(NamedTuple):
    """What one adapter edits at a module: the tokens, sharing interventions how, of its input or its output."""

    positions: Positions
    tied: Tied
    at_input: bool
    groups: Groups = ()  # of the edit's rows


class ReftLayer(nn.Module, BaseTunerLayer):
    """The interventions on one module, by adapter name.

    ``width`` d is that of the hidden states to edit, ``layout`` how they lie in memory (None: (B, S, d)). ``fresh`` says
    that the module's output is nobody else's, so that it can be edited in place: a block's is, another module's may be
    kept for its backward. Somebody's own block is looked at each time, see :func:`fastreft.plan.hooks.hang`.
    """

    adapter_layer_names = _GROUPS
    other_param_names = ("specs",)

    def __init__(self, block: nn.Module, shared: Shared, name: str, width: int, layout: Layout | None, fresh: bool):
        super().__init__()
        self.reft_edit = nn.ModuleDict()
        self.reft_suffix = nn.ModuleDict()
        self.specs: dict[str, Spec] = {}
        self.name, self.width, self.layout, self.fresh = name, width, layout, fresh
        self.checked = False  # has a hidden state of the right shape been seen?
        self._shared = shared
        shared.layers.append(self)
        self._block = (block,)  # in a tuple, as a module must not be its own grandchild
        self._active_adapter = []
        self._hooks: dict[bool, Any] = {}
        self.pools: dict[
            bool, Any
        ] = {}  # of calls that mix adapters, see place_pool; gone when the adapters are others

    def get_base_layer(self) -> nn.Module:
        """The edited module."""
        return self._block[0]

    def update_layer(self, adapter_name: str, config: ReftConfig) -> None:
        """Add an adapter: one intervention, one for the prefix and one for the suffix, or one for each position."""
        self.pools.clear()
        positions = parse(config.positions, pyreft_compat=config.pyreft_compat)
        made = [
            KINDS[config.intervention_type](
                embed_dim=self.width,
                low_rank_dimension=config.r,
                dropout=config.dropout,
                act_fn=config.act_fn,
                add_bias=config.add_bias,
                init_weights=config.start(),
                groups=config.groups(),
            )
            for _ in positions.shares(config.tied)
        ]
        groups = config.groups() if made[0].chosen else ()
        for intervention in made:
            intervention.partition = groups
        held = [nn.ModuleList(made)] if config.tied == "position" else made
        for group, item in zip(_GROUPS, held, strict=False):
            getattr(self, group)[adapter_name] = item
        at_input = config.component == "block_input"
        self.specs[adapter_name] = Spec(positions, config.tied, at_input, groups)
        if at_input not in self._hooks:
            edit = _edit_input if at_input else _edit_output
            look = self.fresh and not blocks.makes_its_output(self._block[0])
            self._hooks[at_input] = hooks.hang(
                self._block[0], self._shared.local, edit, at_input=at_input, prepend=not at_input, look=look
            )
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's method, but the dtype stays: fp32 masters whatever the block's dtype."""
        if device is None:
            device = next((p.device for p in self._block[0].parameters() if p.device.type != "meta"), None)
        for group in _GROUPS:
            container = getattr(self, group)
            if adapter_name in container and not any(p.is_meta for p in container[adapter_name].parameters()):
                container[adapter_name].to(device)

    def interventions(self, adapter_name: str) -> list[Intervention]:
        """An adapter's interventions, prefix first; empty where it does not edit this module."""
        modules: Any = self._modules
        edit = modules["reft_edit"]._modules.get(adapter_name)
        if edit is None:
            return []
        suffix = modules["reft_suffix"]._modules.get(adapter_name)
        if suffix is not None:
            return [edit, suffix]
        return [*edit] if isinstance(edit, nn.ModuleList) else [edit]

    def forget(self, adapter_name: str) -> None:
        """Drop an adapter."""
        self.pools.clear()
        self.specs.pop(adapter_name, None)
        for group in _GROUPS:
            container = getattr(self, group)
            if adapter_name in container:
                del container[adapter_name]
        if isinstance(self._active_adapter, list) and adapter_name in self._active_adapter:
            self._active_adapter = [name for name in self._active_adapter if name != adapter_name]

    def detach(self) -> None:
        """Take the hooks and this layer off the module, and with the last of a model's the model's hooks."""
        if self in self._shared.layers:
            self._shared.layers.remove(self)
        if not self._shared.layers:
            self._shared.take_off()
        block = self._block[0]
        for at_input, handle in self._hooks.items():
            hooks.take_down(block, handle, at_input=at_input)
        del block._modules["reft"]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: another method's tuner merges its own layers and passes by, and ReFT's refuses before it begins."""

    def unmerge(self) -> None:
        """Nothing, as there is no merging."""


# What the hooks call: functions that find the layer through the module, so that copies and replicas use their own.


def _edit_output(module: nn.Module, plan: Plan, hidden: Tensor) -> Tensor:
    """The hidden state that a module gives, as the active adapters leave it: in place where it is nobody else's."""
    return _edited(module, plan, hidden, False)


def _edit_input(module: nn.Module, plan: Plan, hidden: Tensor) -> Tensor:
    """The hidden state that a module takes, edited in a copy."""
    return _edited(module, plan, hidden, True)


def _active(module: nn.Module, layer: Any, plan: Plan) -> Any:
    """The adapters that edit a module in a forward: a recomputation has those of the forward that it recomputes."""
    known = None if is_compiling() else plan.active
    if known is not None and (plan.over or module in known):
        return known.get(module, ())
    active = layer._active_adapter
    names = () if layer._disable_adapters else (active,) if isinstance(active, str) else tuple(active)
    if known is not None:
        known[module] = names
    return names


def _edited(module: nn.Module, plan: Plan, hidden: Tensor, at_input: bool) -> Tensor:
    """The hidden state as the active adapters leave it; ``hidden`` itself where it was edited in place, or not at all."""
    layer: Any = module._modules["reft"]
    names = _active(module, layer, plan)
    if not names:
        return hidden
    compiling = is_compiling()
    if compiling:  # at no cost, and a flag that changes would have it compiled again
        _check(layer, hidden)
    elif not layer.checked:
        _check(layer, hidden)
        layer.checked = True
    where = plan.where if layer.fresh and not at_input and not compiling else NEW
    if plan.mixed is not None:
        return plan.mixed.edit(layer, plan, hidden, at_input, where)
    if plan.subspaces is not None:
        return subspaces.edit(layer, plan, hidden, at_input, where, names)
    for name in names:
        spec = layer.specs.get(name)
        if spec is not None and spec.at_input is at_input:
            found = (
                plan.rows(spec.positions, spec.tied, hidden)
                if layer.layout is None
                else _rows(layer, plan, spec, hidden)
            )
            for intervention, rows in zip(layer.interventions(name), found, strict=False):
                hidden = intervention.edit(hidden, rows, where)  # a plan lists no row twice
    return hidden


def _check(layer: Any, hidden: Any) -> None:
    """``ValueError`` where what a module takes or gives is no hidden state."""
    shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
    least = 2 if layer.layout is layouts.flattened else 3
    if not isinstance(hidden, Tensor) or hidden.ndim < least or hidden.shape[-1] != layer.width:
        raise ValueError(
            f"{layer.name} cannot be edited: its hidden state is {shape}; it must be a tensor (batch, tokens, "
            f"{layer.width}), {layer.width} being the model's hidden size"
        )


def _rows(layer: Any, plan: Plan, spec: Spec, hidden: Tensor) -> list[Tensor | None]:
    """The rows of each intervention in the memory of ``hidden``; None for every row."""
    if layer.layout is layouts.flattened and hidden.ndim > 2:
        return plan.rows(spec.positions, spec.tied, hidden)
    places = layouts.places(layer.layout, hidden, plan.length)
    return [layouts.take(places, rows) for rows in plan.rows(spec.positions, spec.tied, places)]
