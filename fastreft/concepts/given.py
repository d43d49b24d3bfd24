"""What is given to this room, looked at before any work: layers, texts, counts and vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..causal.sites import Site, find_site
from ..models.blocks import hidden_size

Text = Sequence[int] | Tensor


def layer_of(model: nn.Module, layer: int) -> Site:
    """Where a layer's output is; ``ValueError`` for a layer that there is not, which none below 0 is."""
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"layer is {layer!r}; it must be the number of a layer, an integer from 0 on")
    return find_site(model, layer)


def site_of(model: nn.Module, layer: int) -> Site:
    """The same; ``ValueError`` too for a model whose states do not lie sample by sample."""
    site = layer_of(model, layer)
    if site.layout is not None:
        raise ValueError(f"{type(model).__name__} keeps its hidden states otherwise than (batch, tokens, d)")
    return site


def check_vector(model: nn.Module, layer: int, vector: Tensor) -> Site:
    """Where a layer's output is; ``ValueError`` for a vector of another width than that."""
    site = layer_of(model, layer)
    width = hidden_size(model, site.name)
    if vector.shape != (width,):
        raise ValueError(f"vector is {tuple(vector.shape)} at layer {layer}; the model's hidden size is {width}")
    return site


def check_texts(**given: Any) -> None:
    """``ValueError``, by the argument's name, for what is no list of texts."""
    for name, texts in given.items():
        if isinstance(texts, str) or not isinstance(texts, Iterable) or not hasattr(texts, "__len__"):
            raise ValueError(f"{name} is {_short(texts)}; it must be a list of texts, the token ids (n,) of each")
        for i, text in enumerate(texts):
            if not _is_text(text):
                raise ValueError(f"{name}[{i}] is {_short(text)}; a text is its token ids (n,), one at least")


def check_counts(least: int, **given: Any) -> None:
    """``ValueError``, by the argument's name, for what is no integer, or is below the least."""
    for name, count in given.items():
        if isinstance(count, bool) or not isinstance(count, Integral) or int(count) < least:
            raise ValueError(f"{name} is {_short(count)}; it must be an integer of at least {least}")


def _is_text(text: Any) -> bool:
    try:
        ids = torch.as_tensor(text)
    except (TypeError, ValueError, RuntimeError):  # words, lists of odd lengths
        return False
    whole = not ids.is_floating_point() and not ids.is_complex() and ids.dtype is not torch.bool
    return ids.ndim == 1 and len(ids) > 0 and whole


def _short(value: Any) -> str:
    text = str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
