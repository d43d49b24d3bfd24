"""What PEFT does round a ReFT adapter, made all or nothing: loading it, and what is refused before it begins.

PEFT injects an adapter, active and random, before it reads its file, and asks no tuner in between; so a load that fails would
leave that on the caller's model. Here its methods are wrapped, once, when the tuner is imported, which PEFT's own import does.
What has no ReFT adapter in it goes through as it came.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..settings import ReftSettings
from . import names, pairs
from .layer import ReftLayer

PROMPTS = (
    "a prompt-learning adapter ({}) puts tokens before the prompt, so that ReFT's positions would mean others in training than "
    "in generate: use one of the two on a model"
)
# The fields of a configuration that make another edit of the same tensors.
_EDIT = (
    *("intervention_type", "r", "positions", "tied", "component", "act_fn", "add_bias", "pyreft_compat"),
    *("layers_to_transform", "target_modules", "exclude_modules", "modules_to_save"),
)
_within = threading.local()  # is this thread in PeftModel.from_pretrained, which loads over the name it has just made?


def layers_of(model: nn.Module) -> list[ReftLayer]:
    """The ReftLayers of a model."""
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


@contextmanager
def unharmed(model: nn.Module, over: Sequence[str] = ()) -> Iterator[None]:
    """Within it a ReFT adapter is attached and loaded: whatever goes wrong, the model is afterwards as it was.

    ``over`` names the adapters that are there and may be loaded over, whose tensors are kept for as long.
    """
    layers = {layer: set(layer.specs) for layer in layers_of(model)}
    active = {layer: (layer._active_adapter, layer._disable_adapters) for layer in layers}
    wrapped = {id(module) for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    attributes = {*model.__dict__}
    mark = model.__dict__.get("_hf_peft_config_loaded")  # Transformers' own
    held = dict(_configs_of(model))
    tensors = {key: t.clone() for key, t in model.state_dict().items() if _is_of(key, over)} if over else {}
    try:
        yield
    except BaseException as error:
        made = [layer for layer in layers_of(model) if set(layer.specs) != layers.get(layer, set())]
        added = [name for name, config in _configs_of(model).items() if name not in held and config.peft_type == "REFT"]
        if not made and not added and not layers:
            raise
        for layer in made:
            for name in set(layer.specs) - layers.get(layer, set()):
                layer.forget(name)
            if layer not in layers:
                layer.detach()
        for layer, (was_active, disabled) in active.items():
            layer._active_adapter, layer._disable_adapters = was_active, disabled  # type: ignore[assignment]
        for p, flag in flags:
            p.requires_grad_(flag)
        model.load_state_dict(tensors, strict=False)
        if made or added:
            restore_wrapped(model, lambda module: id(module) not in wrapped)
            for name in added:
                _configs_of(model).pop(name, None)
            for name in {*model.__dict__} - attributes:
                del model.__dict__[name]
            if mark is not None:
                model.__dict__["_hf_peft_config_loaded"] = mark
        if isinstance(error, KeyError):  # PEFT's, for a tensor that the file lacks
            raise ValueError(f"the adapter lacks the weights {error.args[0] if error.args else error}") from error
        raise


def _is_of(key: str, adapters: Sequence[str]) -> bool:
    """Is a tensor one of these adapters', by PEFT's rule?"""
    return any(f".{name}." in f"{key}." for name in adapters)


def _configs_of(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "peft_config", None) or {}


def restore_wrapped(model: nn.Module, chosen: Callable[[Any], bool]) -> None:
    """Put the modules that PEFT copied for training (``modules_to_save``) back where they were."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper) and chosen(m)]
    for name, module in found:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module.original_module)


def _base_of(model: Any) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _from_pretrained(inner: Any) -> Any:
    @wraps(inner)
    def from_pretrained(
        cls: Any,
        model: Any,
        model_id: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        base, outer = _base_of(model), getattr(_within, "load", False)
        flags = [(p, p.requires_grad) for p in base.parameters()]
        folder = os.path.join(str(model_id), kwargs.get("subfolder") or "")
        _within.load = True
        try:
            with unharmed(base):
                loaded = inner(cls, model, model_id, adapter_name, is_trainable, *args, **kwargs)
            try:
                with unharmed(base):
                    pairs.attach(loaded, folder, is_trainable)
            except BaseException:
                loaded.unload()
                for p, flag in flags:
                    p.requires_grad_(flag)
                raise
        finally:
            _within.load = outer
        pairs.warn_of_left(loaded, folder, adapter_name, within=False)
        return loaded

    return from_pretrained


def _load_adapter(inner: Any) -> Any:
    @wraps(inner)
    def load_adapter(self: Any, model_id: Any, adapter_name: str = "default", *args: Any, **kwargs: Any) -> Any:
        held, within = self.peft_config.get(adapter_name), getattr(_within, "load", False)
        if held is not None and held.peft_type == "REFT" and not within:
            _check_same(self, held, model_id, adapter_name, kwargs)
        folder = os.path.join(str(model_id), kwargs.get("subfolder") or "")
        beside = {} if held is None else pairs.held_of(self, folder, adapter_name, beside=not within)
        with unharmed(_base_of(self), over=[adapter_name, *beside] if layers_of(self) and held is not None else ()):
            loaded = inner(self, model_id, adapter_name, *args, **kwargs)
            for name, path in beside.items():
                pairs.load(self, name, path)
        if not within:
            pairs.warn_of_left(self, folder, adapter_name, within=True)
        return loaded

    return load_adapter


def _check_same(model: Any, held: Any, model_id: Any, adapter_name: str, kwargs: dict[str, Any]) -> None:
    """``ValueError`` where a file's configuration makes another edit than the adapter has whose place it takes."""
    hub, _ = model._split_kwargs(dict(kwargs))
    given: Any = PeftConfig.from_pretrained(model_id, **hub)
    for name in _EDIT if isinstance(given, ReftSettings) else ("peft_type",):
        ours, theirs = getattr(held, name), getattr(given, name)
        if _plain(ours) != _plain(theirs):
            raise ValueError(
                f"adapter_name is {adapter_name!r}, an adapter with {name} {ours!r}, and the one in '{model_id}' has "
                f"{theirs!r}; load it under another name, or delete that one first"
            )


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (list, tuple, set)) else value


def _add_adapter(inner: Any) -> Any:
    @wraps(inner)
    def add_adapter(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(peft_config, "is_prompt_learning", False) and layers_of(self):
            raise ValueError(PROMPTS.format(peft_config.peft_type.value))
        if getattr(peft_config, "peft_type", None) != "REFT":
            names.check_beside(self, adapter_name)
            return inner(self, adapter_name, peft_config, *args, **kwargs)
        names.check(adapter_name)
        with unharmed(_base_of(self)), warnings.catch_warnings():
            # names.check refuses those that lose tensors; "ref", TRL's name for the reference, is not one of them.
            warnings.filterwarnings("ignore", message=".*should not be contained in the prefix.*")
            return inner(self, adapter_name, peft_config, *args, **kwargs)

    return add_adapter


def _set_adapter(inner: Any) -> Any:
    @wraps(inner)
    def set_adapter(self: Any, adapter_name: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(adapter_name, (list, tuple)) or self.active_peft_config.peft_type != "REFT":
            return inner(self, adapter_name, *args, **kwargs)
        unknown = [name for name in adapter_name if name not in self.peft_config]
        if unknown or not adapter_name or len({*adapter_name}) < len(adapter_name):  # one twice would edit twice
            raise ValueError(
                f"adapter_name is {adapter_name!r}; it must be some of {', '.join(self.peft_config)}, once each"
            )
        inner(self, adapter_name[0], *args, **kwargs)
        return self.base_model.set_adapter(list(adapter_name), *args, **kwargs)

    return set_adapter


def wrap(*others: Callable[[], None]) -> None:
    """Wrap PEFT's methods, and what the others wrap; once."""
    if getattr(PeftModel, "_fastreft", False):
        return
    PeftModel._fastreft = True  # type: ignore[attr-defined]
    PeftModel.from_pretrained = classmethod(_from_pretrained(PeftModel.from_pretrained.__func__))  # type: ignore[assignment, attr-defined]
    PeftModel.load_adapter = _load_adapter(PeftModel.load_adapter)  # type: ignore[method-assign]
    PeftModel.add_adapter = _add_adapter(PeftModel.add_adapter)  # type: ignore[method-assign]
    PeftModel.set_adapter = _set_adapter(PeftModel.set_adapter)  # type: ignore[method-assign]
    for other in others:
        other()
