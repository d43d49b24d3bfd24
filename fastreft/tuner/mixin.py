"""Transformers' own way to load an adapter, ``model.load_adapter(folder)``, held to what PEFT's is: it has the file's tensors
take the places of the model's, whatever they are, and what is missing or left over is a line in a report.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from . import embeddings, pairs, weights
from .layer import ReftLayer
from .loading import layers_of, unharmed


def wrap() -> None:
    """Wrap Transformers' ``load_adapter``."""
    theirs = PeftAdapterMixin.load_adapter

    @wraps(theirs)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        folder = args[0] if args else kwargs.get("peft_model_id")
        name = args[1] if len(args) > 1 else kwargs.get("adapter_name")
        with unharmed(self):
            known = {layer: set(layer.specs) for layer in layers_of(self)}
            before = [(module, name, p) for module in self.modules() for name, p in module._parameters.items()]
            added: dict[ReftLayer, set[str]] = {}
            replaced: dict[tuple[nn.Module, str], Tensor] = {}
            try:
                loaded = theirs(self, *args, **kwargs)
            finally:
                added = {layer: set(layer.specs) - known.get(layer, set()) for layer in layers_of(self)}
                if any(added.values()):
                    replaced = _given_back(before)
            if any(added.values()):
                _check(self, loaded, added, replaced, folder)
        pairs.warn_of_left(self, folder, str(name or "default"), within=True)
        return loaded

    PeftAdapterMixin.load_adapter = load_adapter  # type: ignore[method-assign]


def _given_back(before: list[tuple[nn.Module, str, Any]]) -> dict[tuple[nn.Module, str], Tensor]:
    """Put the model's own tensors back where a file's have taken their places; those."""
    replaced: dict[tuple[nn.Module, str], Tensor] = {}
    for module, name, own in before:
        now = module._parameters.get(name)
        if now is not own and now is not None:
            replaced[module, name] = now
            module._parameters[name] = own
    return replaced


def _check(model: Any, loaded: Any, added: Any, replaced: dict[tuple[nn.Module, str], Tensor], folder: Any) -> None:
    """``ValueError`` for a file that is not this adapter's; else its rotations are orthonormal, and the new words there."""
    for what, keys in (("lacks", loaded.missing_keys), ("holds", loaded.unexpected_keys)):
        if keys:
            raise ValueError(f"loading the adapter: it {what} {min(keys)}, which the model {_WANTS[what]}")
    _check_dtypes(folder)
    names = {module: name for name, module in model.named_modules()}
    tables = embeddings.names_of(model)
    for (module, name), given in replaced.items():
        key = f"{names[module]}.{name}"
        weights.refuse_strangers([key], "", {key}, tables)
        own: Any = module._parameters[name]
        own.data.copy_(embeddings.with_new_rows(key, own, given, model))
    for layer, adapters in added.items():
        for adapter in adapters:
            held = layer.interventions(adapter)
            tensors = {f"{layer.name}.{i}.{k}": t for i, m in enumerate(held) for k, t in m.state_dict().items()}
            for key, mended in weights.checked(tensors, "loading", orthonormal=held[0].orthonormal).items():
                tensors[key].copy_(mended)


_WANTS = {"lacks": "has", "holds": "has no place for"}


def _check_dtypes(folder: Any) -> None:
    """``ValueError`` for a dtype that holds no weights, which Transformers turns into another; of a folder's file."""
    path = Path(str(folder)) / "adapter_model.safetensors"
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            weights.refuse_dtypes({key: file.get_tensor(key).dtype for key in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"loading the adapter: {path} cannot be read: {error}") from error
