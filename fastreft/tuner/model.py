"""ReFT as a PEFT method: ``peft.get_peft_model(model, ReftConfig(...))`` and everything PEFT does with the result.

Nothing of the model is wrapped. Each edited module gets a :class:`fastreft.tuner.layer.ReftLayer` as the submodule ``reft`` and
a hook, which edits a block's output in place, at the rows that the forward's :class:`fastreft.plan.forward.Plan` says. Where a
cache with content comes in (a decode step) only ``positions="all"`` edits.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import optim
from ..kinds import KINDS
from ..models import blocks, layouts
from ..models.components import COMPONENTS
from ..ops.checks import ZERO3
from ..plan.forward import Shared
from ..plan.report import ReftReport, report
from . import beside, columns, embeddings, loading, mixed, mixin, weights
from . import names as adapter_names
from .config import ReftConfig
from .layer import NO_MERGE, ReftLayer
from .steered import Strengths

HEADS = {"SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"}, "QUESTION_ANS": {"qa_outputs"}}


class ReftModel(Strengths, BaseTuner):
    """PEFT's tuner for ReFT; made by :func:`get_reft_model` or ``peft.get_peft_model``.

    Its model takes four more keywords. ``reft_positions`` (B, n): the tokens to edit, as columns of the padded input,
    instead of the configuration's; (k, B, n) where a layer has k interventions that are not ``tied``. ``reft_labels`` (B, S):
    labels that say where the prompt ends, of which no loss is taken. ``reft_prompt_lengths`` (B,): its tokens, padding aside.
    ``subspaces``: the groups of the edit's rows that each sample is edited with, see :func:`fastreft.ops.subspaces.parse`.
    Raises ``ValueError`` where the configuration does not fit, or another method's adapter on the model has the name.
    """

    prefix = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        _check_name(model, adapter_name)
        for config in getattr(model, "peft_config", {}).values() if isinstance(model, PeftModel) else ():
            if config.is_prompt_learning:
                raise ValueError(loading.PROMPTS.format(config.peft_type.value))
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        optim.guard_optimizers()
        columns.accept(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, through its hooks (``model.forward`` would pass them by)."""
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")  # which PEFT then takes off the call
        mix = None if names is None else mixed.of_call(self, names, args, kwargs)
        if is_compiling():
            yield
            return
        here = self._shared.local.here
        plan, outer, before = here.plan, here.outer, here.mixed
        here.mixed = here.steered if mix is None else mix
        try:
            with nullcontext() if mix is None else mix.heads(self):
                yield
        except BaseException:  # Ctrl-C, of which torch tells no hook: a backward may come next
            here.back(plan, outer)
            raise
        finally:
            here.mixed = before

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's; ``ValueError`` for a name that would make saving other adapters lose tensors."""
        adapter_names.check(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        """Find the modules to edit and check the configuration against the model, before anything is attached."""
        if any(hasattr(p, "ds_id") for p in self.model.parameters()):
            raise ValueError(ZERO3)
        config: Any = peft_config
        self._fresh: set[str] = set()
        if config.target_modules is None:
            found = blocks.find_blocks(self.model)
            names, layers = found.names, list(range(len(found.names)))
            if config.component in COMPONENTS:
                chosen = config.layers_among(layers)
                pairs = zip(found.names, found.modules, strict=True)
                names = [
                    blocks.component_of(name, block, config.component)[0] if i in chosen else name
                    for i, (name, block) in enumerate(pairs)
                ]
            else:
                self._fresh = set(names)
        else:
            names = [
                name
                for name, module in self.model.named_modules()
                if name and not isinstance(module, ReftLayer) and _matches(config, config.target_modules, name)
            ]
            layers = [_layer_of(name) for name in names]
        wanted = config.layers_among(layers)
        self._targets = {
            name
            for name, layer in zip(names, layers, strict=True)
            if layer in wanted and _matches(config, [name], name)
        }
        if not self._targets:
            raise ValueError(
                f"target_modules is {config.target_modules!r} and exclude_modules {config.exclude_modules!r}; "
                f"that leaves no module of this {type(self.model).__name__} to edit"
            )
        names_of_new = adapter_names.parts_to_come(config, self._targets)
        for name in (name for name, held in self.peft_config.items() if held is config):
            adapter_names.check_beside(self, name, names_of_new)
        self._check_modules_to_save(config)
        self._say_of_head(config)
        for name in sorted(self._targets):
            self._check_width(config, name)
        return peft_config

    def _check_modules_to_save(self, config: ReftConfig) -> None:
        """``ValueError`` for a name that no module's ends in; PEFT itself adds the names that heads of a task may have."""
        wanted = set(config.modules_to_save or ())
        if config.task_type in HEADS:
            wanted -= HEADS[config.task_type]
        names = [name for name, _ in self.model.named_modules()]
        for missing in sorted(end for end in wanted if not any(name.endswith(end) for name in names)):
            raise ValueError(
                f"modules_to_save is {config.modules_to_save!r}; this {type(self.model).__name__} has no module whose name "
                f"ends in {missing!r}"
            )

    def _say_of_head(self, config: ReftConfig) -> None:
        """A classifier's head is trained where ``task_type`` or ``modules_to_save`` say so; a fresh one is nothing without."""
        kind = type(self.model).__name__.partition("For")[2]
        task = {
            "SequenceClassification": "SEQ_CLS",
            "TokenClassification": "TOKEN_CLS",
            "QuestionAnswering": "QUESTION_ANS",
        }
        if kind in task and not (config.task_type or config.modules_to_save or config.inference_mode):
            warnings.warn(
                f"the head of this {type(self.model).__name__} is not trained: give task_type='{task[kind]}', or "
                "modules_to_save, unless it has been trained before",
                stacklevel=2,
            )

    def _check_width(self, config: ReftConfig, name: str) -> None:
        """``ValueError`` where a module's width is known and does not fit; else its first forward tells."""
        width, module = blocks.hidden_size(self.model, name), self.model.get_submodule(name)
        if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise ValueError(
                f"target_modules means {name}, a {type(module).__name__}, which runs whatever is in it; name its last module"
            )
        if config.r > width:
            raise ValueError(f"r is {config.r}; it must be at most the model's hidden size, {width}")
        given = getattr(module, "out_features", width)
        if given != width:
            raise ValueError(f"the output of {name} is {given} wide; it must have the model's hidden size, {width}")

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        attached = [module for module in model.modules() if isinstance(module, ReftLayer)]
        if attached:
            self._shared = attached[0]._shared
            self._shared.enter(model, sorted(self._targets))
        else:
            self._shared = Shared(model, sorted(self._targets))

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
            kinds = (getattr(config, "model_type", "") for config in blocks.configs_above(self.model, current_key))
            layout = next(filter(None, map(layouts.layout_of, kinds)), None)
            width = blocks.hidden_size(self.model, current_key)
            layer = ReftLayer(target, self._shared, current_key, width, layout, fresh=current_key in self._fresh)
            target.add_module("reft", layer)
        layer.update_layer(adapter_name, peft_config)
        spec = layer.specs[adapter_name]
        self._shared.add(spec.positions, bool(spec.groups))
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def reft_report(self) -> ReftReport:
        """What this thread's last forward edited, decode steps aside: rows by layer and adapter, the positions meant, and how
        many tokens of each sample were taken for the prompt. Waits for a GPU. ``RuntimeError`` after a compiled forward."""
        if self._shared.local.here.compiled:
            raise RuntimeError(
                "reft_report() is of the last forward, which ran compiled and keeps no record of its rows: run it without "
                "torch.compile"
            )

        def spec_of(module: Any, name: str) -> tuple[str, Any, Any] | None:
            spec = module._modules["reft"].specs.get(name)
            return None if spec is None else (module._modules["reft"].name, spec.positions, spec.tied)

        return report(list(self._shared.local.here.latest.values()), spec_of)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; another adapter then becomes active in every block, also where the deleted one was not. ``ValueError`` for
        the last of ReFT's, without which a PeftModel cannot be called."""
        ours = [name for name, config in self.peft_config.items() if config.peft_type == "REFT"]
        if ours == [adapter_name]:
            raise ValueError(
                f"adapter_name is {adapter_name!r}, the only ReFT adapter there is, without which this PeftModel cannot be "
                "called: unload() gives the model back without it"
            )
        was_active = adapter_name in self.active_adapters
        left = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        left = left or [name for name in ours if name != adapter_name][:1]
        if was_active and left:
            self.set_adapter(left if len(left) > 1 else left[0])

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    def unmerge_adapter(self) -> None:
        """Always a ``ValueError``, as there is no merging."""
        raise ValueError(NO_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """PEFT's, but what is another method's stays; modules that were trained whole take their places in the model."""
        if merge:
            self._check_merge_allowed()
        trained = []
        for name, module in self.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and module._adapters & set(self.peft_config):
                new = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                trained.append((*name.rpartition(".")[::2], new))
        for layer in loading.layers_of(self.model):
            layer.detach()
        for parent, attribute, new in trained:
            setattr(self.model.get_submodule(parent), attribute, new)
        others = any(isinstance(module, BaseTunerLayer) for module in self.model.modules())
        if "peft_config" in self.model.__dict__ and not others:
            del self.model.__dict__["peft_config"]
        elif others:
            self.model.peft_config = {  # type: ignore[assignment]
                name: config for name, config in self.peft_config.items() if config.peft_type != "REFT"
            }
        return self.model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """PEFT's; ``ValueError`` before anything is written for weights that are not finite, or would be left out."""
        adapter_names.check_saved(model, adapter_name, unwanted_adapter_names)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        ours = {key: value for key, value in found.items() if ".reft.reft_" in key}
        return found | weights.checked(ours, "saving", orthonormal=_orthonormal(config))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT takes the name off a key's last or last but one place; an activation's parameters lie deeper."""
        return re.sub(rf"(\.reft\.reft_\w+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's, but an adapter of another shape of model is refused, where PEFT warns."""
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        ours = rf"\.reft\.reft_\w+\.{re.escape(adapter_name)}\."
        held = model.state_dict()
        wanted = {k: tuple(v.shape) for k, v in held.items() if re.search(ours, k)}
        given = {k: tuple(v.shape) for k, v in state_dict.items() if ".reft.reft_" in k}
        problem = None
        if wanted.keys() != given.keys():
            odd = min(wanted.keys() ^ given.keys())
            problem = f"it holds weights for {_listing(given)}, the model wants them for {_listing(wanted)}, see {odd}"
        elif wanted != given:
            key = next(key for key in wanted if wanted[key] != given[key])
            problem = f"its {key.rsplit('.', 1)[-1]} has shape {given[key]}, the model wants {wanted[key]}"
        if problem is None:
            base = _bare(model)
            tables = weights.refuse_strangers(state_dict, adapter_name, held, embeddings.names_of(base))
            tensors = {k: v for k, v in state_dict.items() if k in given}
            mended = weights.checked(tensors, "loading", orthonormal=_orthonormal(config))
            new = {k: embeddings.with_new_rows(k, held[own], state_dict[k], base) for k, own in tables.items()}
            return state_dict | mended | new
        raise ValueError(f"the adapter does not fit this {type(_bare(model)).__name__}: {problem}")


def _bare(model: Any) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _orthonormal(config: Any) -> bool:
    """Is an R of an adapter kept orthonormal?"""
    return KINDS[config.intervention_type].orthonormal


def _listing(keys: Any) -> str:
    """The blocks that hold some keys, in words."""
    names = sorted({key.split(".reft.")[0].removeprefix("base_model.model.") for key in keys}, key=_layer_of)
    return f"{len(names)} blocks ({names[0]} to {names[-1]})" if names else "no block"


def _layer_of(name: str) -> int:
    """The layer that a module's name speaks of: its first number; -1 where it has none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else -1


def _check_name(model: nn.Module, adapter_name: str) -> None:
    """``ValueError`` where another method's adapter has the name: PEFT would save both under this one's configuration."""
    held = getattr(model, "peft_config", {}).get(adapter_name)
    others = (isinstance(m, BaseTunerLayer) and not isinstance(m, ReftLayer) for m in model.modules())
    if held is not None and held.peft_type != "REFT" and any(others):
        raise ValueError(
            f"adapter_name is {adapter_name!r}, as the model's {held.peft_type.value} adapter is named, which could no longer "
            "be saved; give another: inject_adapter_in_model(config, model, adapter_name='edit')"
        )


def _matches(config: ReftConfig, targets: list[str] | str, name: str) -> Any:
    """PEFT's rule for names, endings, regular expressions and exclusions; layers are chosen by us."""
    rule = SimpleNamespace(
        target_modules=targets, exclude_modules=config.exclude_modules, modules_to_save=config.modules_to_save
    )
    return check_target_module_exists(rule, name)


def get_reft_model(model: nn.Module, config: ReftConfig, adapter_name: str = "default", **kwargs: Any) -> PeftModel:
    """``peft.get_peft_model`` for a :class:`ReftConfig`; the model's weights are frozen and its blocks get hooks."""
    adapter_names.check(adapter_name)
    with quiet_peft():
        return get_peft_model(model, config, adapter_name=adapter_name, **kwargs)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that PEFT asks for gradient checkpointing by a name that Transformers is giving up."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


PEFT_TYPE_TO_CONFIG_MAPPING[ReftConfig().peft_type] = ReftConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[ReftConfig().peft_type] = ReftModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[ReftConfig().peft_type] = ReftModel.prefix  # type: ignore[index]
loading.wrap(mixin.wrap, beside.wrap)
