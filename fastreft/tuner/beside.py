"""ReFT beside another method's adapter in one model. PEFT's tuner of the other, LoRA's say, walks over every layer of adapters
that it finds, or over its own alone, and knows nothing of ours: what would lose an edit or leave half of something is refused,
or done properly, here, before the first layer is touched.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _check_adapters_not_merged,
    _delete_auxiliary_adapter,
    delete_adapter,
)
from torch import nn

from . import names
from .layer import NO_MERGE, ReftLayer
from .loading import layers_of

STAYS = (
    "the model holds the ReFT adapter {}, which would stay in it without a configuration, and be left out of every save: save "
    "it and take it off first, with delete_adapter({!r}), and load it again into what comes out"
)
MOVED = (
    "the edit of {} acts on that module's output before the {} adapter is added to it, and merged it would act after: load the "
    "ReFT adapter once the other is there, whose module then is edited as a whole"
)


def forget(tuner: Any, adapter_name: str) -> None:
    """Delete a ReFT adapter from a model that another method's tuner is round."""
    for layer in layers_of(tuner.model):
        layer.forget(adapter_name)
        if not layer.specs:
            layer.detach()
    _delete_auxiliary_adapter(tuner.model, adapter_name, list(tuner.active_adapters)[:1])
    del tuner.peft_config[adapter_name]


def forget_others(tuner: Any, adapter_name: str) -> None:
    """Delete another method's adapter from a model that ReFT's tuner is round."""
    _check_adapters_not_merged(tuner.model, adapter_name)
    of: Any = PEFT_TYPE_TO_TUNER_MAPPING[tuner.peft_config[adapter_name].peft_type]
    delete_adapter(tuner.model, adapter_name=adapter_name, prefix=of.prefix, layer_cls=of.tuner_layer_cls)
    del tuner.peft_config[adapter_name]


def _names_of(model: nn.Module) -> list[str]:
    return sorted({name for layer in layers_of(model) for name in layer.specs})


def _is_ours(tuner: Any) -> bool:
    return getattr(type(tuner), "tuner_layer_cls", None) is ReftLayer  # some of PEFT's have none


def _init(inner: Any) -> Any:
    @wraps(inner)
    def __init__(self: Any, model: Any, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not _is_ours(self) and layers_of(model):
            held = (getattr(model, "peft_config", None) or {}).get(adapter_name)
            if held is not None and held.peft_type == "REFT":
                raise ValueError(
                    f"adapter_name is {adapter_name!r}, as the model's ReFT adapter is named, which could no longer be saved; "
                    "give another: inject_adapter_in_model(config, model, adapter_name='other')"
                )
            names.check_beside(model, adapter_name)
        inner(self, model, peft_config, adapter_name, *args, **kwargs)

    return __init__


def _merge_adapter(inner: Any) -> Any:
    @wraps(inner)
    def merge_adapter(self: Any, adapter_names: Any = None, *args: Any, **kwargs: Any) -> None:
        if not _is_ours(self) and layers_of(self.model):
            if set(adapter_names or ()) & {*_names_of(self.model)}:
                raise ValueError(f"adapter_names is {adapter_names!r}: {NO_MERGE}")
            _check_order(self)
        inner(self, adapter_names, *args, **kwargs)

    return merge_adapter


def _check_order(tuner: Any) -> None:
    """``ValueError`` where an edit lies within what is to be merged."""
    for name, module in tuner.model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ReftLayer):
            held: Any = module.get_base_layer()
            if "reft" in held._modules:
                raise ValueError(MOVED.format(name, type(tuner).__name__.removesuffix("Model")))


def _unload(inner: Any) -> Any:
    @wraps(inner)
    def unload(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = [] if _is_ours(self) else _names_of(self.model)
        if held:
            raise ValueError(STAYS.format(", ".join(map(repr, held)), held[0]))
        return inner(self, *args, **kwargs)

    return unload


def _delete_adapter(inner: Any) -> Any:
    @wraps(inner)
    def delete_adapter(self: Any, adapter_name: str) -> None:
        held = self.peft_config.get(adapter_name)
        if held is None or (held.peft_type == "REFT") is _is_ours(self) or not layers_of(self.model):
            inner(self, adapter_name)
        elif _is_ours(self):
            forget_others(self, adapter_name)
        else:
            forget(self, adapter_name)

    return delete_adapter


def wrap() -> None:
    """Wrap what PEFT's tuners have in common."""
    tuner: Any = BaseTuner
    tuner.__init__ = _init(tuner.__init__)
    tuner.merge_adapter = _merge_adapter(tuner.merge_adapter)
    tuner.merge_and_unload = _unload(tuner.merge_and_unload)
    tuner.unload = _unload(tuner.unload)
    tuner.delete_adapter = _delete_adapter(tuner.delete_adapter)
