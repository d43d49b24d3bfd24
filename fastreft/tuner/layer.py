"""What a ReFT adapter hangs on a module of the model: its interventions, and the hooks that apply them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..interventions import INTERVENTIONS, Intervention
from ..models import layouts
from ..models.layouts import Layout
from ..ops import edit as _ops
from ..plan import positions
from ..plan.forward import Plan, Shared
from ..plan.positions import Positions, Tied
from .config import ReftConfig

# The attributes of a ReftLayer that hold interventions, or, with one for each position, a list of them in the first. The
# second is only filled where prefix and suffix have one each.
_GROUPS = ("reft_edit", "reft_suffix")
# Where a module keeps the hooks that get its input, and those that get its output.
_KEPT = {True: "_forward_pre_hooks", False: "_forward_hooks"}
NO_MERGE = "an edit at positions has no weight form, so it cannot be merged; save the adapter instead"


class Spec(NamedTuple):
    """What one adapter edits at a module: the tokens, sharing interventions how, of its input or its output."""

    positions: Positions
    tied: Tied
    at_input: bool


class ReftLayer(nn.Module, BaseTunerLayer):
    """The interventions on one module, by adapter name.

    ``width`` d is that of the hidden states to edit, ``layout`` how they lie in memory (None: (B, S, d)). ``fresh`` says
    that the module's output is nobody else's, so that it can be edited in place: a block's is, another module's may be
    kept for its backward.
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

    def get_base_layer(self) -> nn.Module:
        """The edited module."""
        return self._block[0]

    def update_layer(self, adapter_name: str, config: ReftConfig) -> None:
        """Add an adapter: one intervention, one for the prefix and one for the suffix, or one for each position."""
        spec = positions.parse(config.positions, pyreft_compat=config.pyreft_compat)
        made = [
            INTERVENTIONS[config.intervention_type](
                embed_dim=self.width,
                low_rank_dimension=config.r,
                dropout=config.dropout,
                act_fn=config.act_fn,
                add_bias=config.add_bias,
            )
            for _ in spec.shares(config.tied)
        ]
        held = [nn.ModuleList(made)] if config.tied == "position" else made
        for group, item in zip(_GROUPS, held, strict=False):
            getattr(self, group)[adapter_name] = item
        at_input = config.component == "block_input"
        self.specs[adapter_name] = Spec(spec, config.tied, at_input)
        if at_input not in self._hooks:
            self._hook(at_input)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _hook(self, at_input: bool) -> None:
        """Hang our hook; an output's comes first: whoever else looks at it sees it edited, as the modules after it do."""
        block, shared = self._block[0], self._shared
        hooks = HooksWithWork()
        if not len(getattr(block, _KEPT[at_input])):  # else the handles of others' hooks would lose what they are in
            setattr(block, _KEPT[at_input], hooks)
        handle = self._hooks[at_input] = (
            block.register_forward_pre_hook(partial(_edit_input, shared), with_kwargs=True)
            if at_input
            else block.register_forward_hook(partial(_edit_output, shared), prepend=True)
        )
        hooks.own = shared.local, handle.id

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

    def detach(self) -> None:
        """Take the hooks and this layer off the module."""
        block = self._block[0]
        for at_input, hook in self._hooks.items():
            hook.remove()
            hooks = getattr(block, _KEPT[at_input])
            if isinstance(hooks, HooksWithWork) and not len(hooks):  # a pickled base needs nothing of ours
                setattr(block, _KEPT[at_input], OrderedDict())
        del block._modules["reft"]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always a ``ValueError``: a weight acts on every token, an edit on chosen ones."""
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Always a ``ValueError``, as there is no merging."""
        raise ValueError(NO_MERGE)


class HooksWithWork(OrderedDict[int, Any]):
    """A module's hooks; false while ours is the only one and this thread's forward edits nothing, as a decode step does.

    ``nn.Module`` asks for their truth at each call, and where it finds none takes a shorter way, which saves several
    microseconds a block. Who asks for longer than a call, the compiler first of all, asks for their number.
    """

    own: tuple[Any, int | None] = (None, None)  # what each thread is in, and the key of our hook

    def __bool__(self) -> bool:
        local, ours = self.own
        number = len(self)
        if number != 1 or ours not in self:
            return number > 0
        plan = local.here.plan
        return plan is not None and not plan.idle


# The hooks are functions that find the layer through the module, so that copies and replicas use their own. A decode step
# goes no further than its plan: what it costs is measured against 2% of a small model's step.


def _edit_output(shared: Shared, block: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook: the module's output with the rows of this forward edited; None where nothing is to do."""
    plan = shared.local.here.plan
    if plan is None or plan.idle:
        return None
    layer: Any = block._modules["reft"]
    if layer._disable_adapters:
        return None
    given = output if isinstance(output, Tensor) else first(output)
    hidden = _edited(layer, plan, given, False)
    if hidden is given:
        return None
    return hidden if isinstance(output, Tensor) else with_first(output, hidden)


def _edit_input(shared: Shared, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward pre-hook: the module's arguments with the hidden state, their first tensor, edited in a copy."""
    plan = shared.local.here.plan
    if plan is None or plan.idle:
        return None
    layer: Any = block._modules["reft"]
    if layer._disable_adapters:
        return None
    if args:
        return (_edited(layer, plan, args[0], True), *args[1:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor) and value.is_floating_point())
    return args, kwargs | {name: _edited(layer, plan, kwargs[name], True)}


def first(output: Any) -> Tensor:
    """The hidden state of an output that holds more: its first entry."""
    if isinstance(output, dict):
        return next(iter(output.values()))
    return getattr(output, dataclasses.fields(output)[0].name) if dataclasses.is_dataclass(output) else output[0]


def with_first(output: Any, hidden: Tensor) -> Any:
    """The output with another first entry."""
    if isinstance(output, dict):
        output[next(iter(output))] = hidden
        return output
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{dataclasses.fields(output)[0].name: hidden})  # type: ignore[type-var]
    entries = (hidden, *output[1:])
    return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)


def _edited(layer: Any, plan: Plan, hidden: Tensor, at_input: bool) -> Tensor:
    """The hidden state as the active adapters leave it; ``hidden`` itself where it was edited in place, or not at all."""
    compiling = is_compiling()
    if compiling:  # at no cost, and a flag that changes would have it compiled again
        _check(layer, hidden)
    elif not layer.checked:
        _check(layer, hidden)
        layer.checked = True
    active = layer._active_adapter
    inplace = layer.fresh and not at_input and not compiling
    for name in (active,) if isinstance(active, str) else active:
        spec = layer.specs.get(name)
        if spec is not None and spec.at_input is at_input:
            found = (
                plan.rows(spec.positions, spec.tied, hidden)
                if layer.layout is None
                else _rows(layer, plan, spec, hidden)
            )
            for intervention, rows in zip(layer.interventions(name), found, strict=False):
                hidden = edit(intervention, hidden, rows, inplace)
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


def edit(intervention: Intervention, hidden: Tensor, rows: Tensor | None, inplace: bool) -> Tensor:
    """The edited hidden state, shape of ``hidden``: in place, which the compiler cannot, where autograd allows it; else a
    new tensor."""
    # forward() and not a call: an edit costs microseconds, and so does a module's call. A plan lists no row twice.
    if rows is None:
        return intervention.forward(hidden)
    if inplace and intervention.fused is not None and not (intervention.dropout and intervention.training):
        U, V, P, b, c = intervention.weights()
        done = _ops.quick_edit_rows_(hidden, rows, U, V, P, b, c, intervention.fused, True)
        if done is not NotImplemented:
            return done
    return intervention.forward(hidden, rows=rows, inplace=inplace and not _refuses_edits(hidden), unique=True)


def _refuses_edits(hidden: Tensor) -> bool:
    """Is an in-place edit impossible: scattered memory, or a leaf or one of several views, which autograd refuses?"""
    if not hidden.is_contiguous():
        return True
    if not torch.is_grad_enabled():
        return False
    base = hidden
    if hidden._is_view():
        if torch._C._autograd._get_creation_meta(hidden) != torch._C._autograd.CreationMeta.DEFAULT:
            return True
        base = hidden._base  # type: ignore[assignment]
    return base.is_leaf and base.requires_grad
