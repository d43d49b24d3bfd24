"""ReFT as a PEFT method: ``peft.get_peft_model(model, ReftConfig(...))`` and everything PEFT does with the result.

Nothing of the model is wrapped. Each edited block gets a :class:`ReftLayer` as the submodule ``reft`` and one forward
hook, which edits the block's output in place, at the rows that the forward's :class:`fastreft.plan.Plan` says. Where a
cache with content comes in (a decode step) only ``positions="all"`` edits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from . import blocks, optim, positions
from .config import ReftConfig
from .interventions import INTERVENTIONS, Intervention
from .plan import Shared
from .positions import Positions

# The attributes of a ReftLayer that hold interventions; the second is only filled for the suffix of untied ones.
_GROUPS = ("reft_edit", "reft_suffix")
# PEFT tells the tensors of a file apart by looking for adapters' names in theirs, so these are not free.
_TAKEN = ("R", "W", "P", "b", "c", "act", "weight", "reft")
_NO_MERGE = "an edit at positions has no weight form, so it cannot be merged; save the adapter instead"


class ReftLayer(nn.Module, BaseTunerLayer):
    """The interventions on one block, by adapter name."""

    adapter_layer_names = _GROUPS
    other_param_names = ("specs",)

    def __init__(self, block: nn.Module, shared: Shared):
        super().__init__()
        self.reft_edit = nn.ModuleDict()
        self.reft_suffix = nn.ModuleDict()
        self.specs: dict[str, tuple[Positions, bool]] = {}
        self._shared = shared
        self._block = (block,)  # in a tuple, as a module must not be its own grandchild
        self._active_adapter = []
        self._hook = block.register_forward_hook(_edit_output)

    def get_base_layer(self) -> nn.Module:
        """The edited block."""
        return self._block[0]

    def update_layer(self, adapter_name: str, config: ReftConfig, hidden_size: int) -> None:
        """Add an adapter: one intervention, or one for the prefix and one for the suffix."""
        spec = positions.parse(config.positions, pyreft_compat=config.pyreft_compat)
        tied = spec.groups(config.tied) == 1
        for group in _GROUPS[: 1 if tied else 2]:
            getattr(self, group)[adapter_name] = INTERVENTIONS[config.intervention_type](
                embed_dim=hidden_size,
                low_rank_dimension=config.r,
                dropout=config.dropout,
                act_fn=config.act_fn,
                add_bias=config.add_bias,
            )
        self.specs[adapter_name] = (spec, tied)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's method, but the dtype stays: fp32 masters whatever the block's dtype."""
        if device is None:
            device = next((p.device for p in self._block[0].parameters() if p.device.type != "meta"), None)
        for group in _GROUPS:
            container = getattr(self, group)
            if adapter_name in container and not any(p.is_meta for p in container[adapter_name].parameters()):
                container[adapter_name].to(device)

    def detach(self) -> None:
        """Take the hook and this layer off the block."""
        self._hook.remove()
        del self._block[0]._modules["reft"]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always a ``ValueError``: a weight acts on every token, an edit on chosen ones."""
        raise ValueError(_NO_MERGE)

    def unmerge(self) -> None:
        """Always a ``ValueError``, as there is no merging."""
        raise ValueError(_NO_MERGE)


def _edit_output(block: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of a block: its output with the rows of this forward edited; None where nothing is to do.

    A plain function that finds the layer through the block, so that copies and replicas of a block use their own.
    """
    layer: Any = block._modules["reft"]
    plan = layer._shared.local.plan
    if plan is None or plan.idle or layer._disable_adapters:
        return None
    given = hidden = output if isinstance(output, Tensor) else output[0]
    active = layer._active_adapter
    for name in (active,) if isinstance(active, str) else active:
        positions_of = layer.specs.get(name)
        if positions_of is not None:
            for group, rows in zip(_GROUPS, plan.rows(*positions_of, hidden), strict=False):
                hidden = _edit(layer._modules[group]._modules[name], hidden, rows)
    if hidden is given:
        return None
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, dict):
        output[next(iter(output))] = hidden
        return output
    return type(output)((hidden, *output[1:]))


def _edit(intervention: Intervention, hidden: Tensor, rows: Tensor | None) -> Tensor:
    """The edited hidden state (B, S, d): in place where autograd and the compiler allow, else a new tensor."""
    # forward() and not a call: an edit costs microseconds, and so does a module's call. A plan lists no row twice.
    if rows is None:
        return intervention.forward(hidden)
    if torch.compiler.is_compiling():
        return intervention.forward(hidden, rows=rows, inplace=False, unique=True)
    if _refuses_edits(hidden):
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    return intervention.forward(hidden, rows=rows, unique=True)


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


class ReftModel(BaseTuner):
    """PEFT's tuner for ReFT; made by :func:`get_reft_model` or ``peft.get_peft_model``.

    Its model takes one more keyword, ``reft_positions`` (B, n): the tokens to edit, as columns of the padded input,
    instead of the configuration's (untied: (2, B, n)). Raises ``ValueError`` where the configuration does not fit.
    """

    prefix = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        optim.guard_optimizers()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, through its hooks (``model.forward`` would pass them by)."""
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT takes adapter_names off the call and would say nothing where the tuner does not know them.
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names is not supported: a batch is edited by the active adapter, see set_adapter")
        yield

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's; ``ValueError`` for a name that would make saving other adapters lose tensors."""
        if adapter_name in _TAKEN:
            raise ValueError(f"adapter_name is {adapter_name!r}; it must be none of {', '.join(_TAKEN)}")
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        """Find the modules to edit and check the configuration against the model, before anything is attached."""
        config: Any = peft_config
        self._hidden_size = blocks.hidden_size(self.model)
        if config.r > self._hidden_size:
            raise ValueError(f"r is {config.r}; it must be at most the model's hidden size, {self._hidden_size}")
        if config.target_modules is None:
            names = [name for name, _ in blocks.find_blocks(self.model)]
            layers = list(range(len(names)))
        else:
            names = [
                name
                for name, module in self.model.named_modules()
                if name and not isinstance(module, ReftLayer) and _matches(config, config.target_modules, name)
            ]
            layers = [_layer_of(name) for name in names]
        wanted = config.layers_to_transform
        if wanted is not None:
            wanted = {wanted} if isinstance(wanted, int) else set(wanted)
            if names and not wanted <= set(layers):
                raise ValueError(
                    f"layers_to_transform is {config.layers_to_transform!r}; the model's layers to choose from are "
                    f"{min(layers)} to {max(layers)}"
                )
        self._targets = {
            name
            for name, layer in zip(names, layers, strict=True)
            if (wanted is None or layer in wanted) and _matches(config, [name], name)
        }
        if not self._targets:
            raise ValueError(
                f"target_modules is {config.target_modules!r} and exclude_modules {config.exclude_modules!r}; "
                f"that leaves no module of this {type(self.model).__name__} to edit"
            )
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        attached = [module for module in model.modules() if isinstance(module, ReftLayer)]
        self._shared = attached[0]._shared if attached else Shared(model, sorted(self._targets))

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        return key in self._targets or _matches(peft_config, [], key)  # which tells PEFT of the excluded ones

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer: Any = target._modules.get("reft")
        if layer is None:
            layer = ReftLayer(target, self._shared)
            target.add_module("reft", layer)
        layer.update_layer(adapter_name, peft_config, self._hidden_size)
        self._shared.add(layer.specs[adapter_name][0])
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; another adapter then becomes active in every block, also where the deleted one was not."""
        was_active = adapter_name in self.active_adapters
        left = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        left = left or list(self.peft_config)[:1]
        if was_active and left:
            self.set_adapter(left if len(left) > 1 else left[0])

    def _check_merge_allowed(self) -> None:
        raise ValueError(_NO_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if merge:
            self._check_merge_allowed()
        for module in [module for module in self.model.modules() if isinstance(module, ReftLayer)]:
            module.detach()
        for handle in self._shared.handles:
            handle.remove()
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT takes the name off a key's last or last but one place; an activation's parameters lie deeper."""
        return re.sub(rf"(\.reft\.reft_\w+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's, but an adapter of another shape of model is refused and not left active, where PEFT warns."""
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        ours = rf"\.reft\.reft_\w+\.{re.escape(adapter_name)}\."
        wanted = {k: tuple(v.shape) for k, v in model.state_dict().items() if re.search(ours, k)}
        given = {k: tuple(v.shape) for k, v in state_dict.items() if ".reft.reft_" in k}
        problem = None
        if wanted.keys() != given.keys():
            odd = min(wanted.keys() ^ given.keys())
            problem = f"it holds weights for {_listing(given)}, the model wants them for {_listing(wanted)}, see {odd}"
        elif wanted != given:
            key = next(key for key in wanted if wanted[key] != given[key])
            problem = f"its {key.rsplit('.', 1)[-1]} has shape {given[key]}, the model wants {wanted[key]}"
        if problem is None:
            return state_dict
        for module in model.modules():
            if isinstance(module, ReftLayer):
                module.set_adapter([name for name in module.active_adapters if name != adapter_name])
        raise ValueError(f"the adapter does not fit this {type(_bare(model)).__name__}: {problem}")


def _bare(model: Any) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _listing(keys: Any) -> str:
    """The blocks that hold some keys, in words."""
    names = sorted({key.split(".reft.")[0].removeprefix("base_model.model.") for key in keys}, key=_layer_of)
    return f"{len(names)} blocks ({names[0]} to {names[-1]})" if names else "no block"


def _layer_of(name: str) -> int:
    """The layer that a module's name speaks of: its first number; -1 where it has none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else -1


def _matches(config: ReftConfig, targets: list[str] | str, name: str) -> Any:
    """PEFT's rule for names, endings, regular expressions and exclusions; layers are chosen by us."""
    rule = SimpleNamespace(
        target_modules=targets, exclude_modules=config.exclude_modules, modules_to_save=config.modules_to_save
    )
    return check_target_module_exists(rule, name)


def get_reft_model(model: nn.Module, config: ReftConfig, adapter_name: str = "default", **kwargs: Any) -> PeftModel:
    """``peft.get_peft_model`` for a :class:`ReftConfig`; the model's weights are frozen and its blocks get hooks."""
    return get_peft_model(model, config, adapter_name=adapter_name, **kwargs)


PEFT_TYPE_TO_CONFIG_MAPPING[ReftConfig().peft_type] = ReftConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[ReftConfig().peft_type] = ReftModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[ReftConfig().peft_type] = ReftModel.prefix  # type: ignore[index]
