"""The hidden states of texts at a layer, without the layers behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..causal.sites import evaluating
from .given import Text, check_counts, check_texts, site_of


class _Reached(Exception):
    """The layer has been run, and nothing behind it is asked for."""


def padded(texts: Sequence[Text], device: torch.device) -> dict[str, Tensor]:
    """Token ids and their mask, padded at the end."""
    rows = [torch.as_tensor(text, dtype=torch.int64) for text in texts]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": pad_sequence(rows, batch_first=True).to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def states(
    model: nn.Module, layer: int, texts: Sequence[Text], *, batch_size: int = 16, first: int = 1
) -> Iterator[Tensor]:
    """The states (n, d), fp32, of each text's tokens behind a layer, without its ``first`` ones; in the order of the texts.

    The model is in evaluation while it runs. ``ValueError`` for a layer that there is not, an empty text, what is no text, a
    ``batch_size`` below 1 or a ``first`` below 0.
    """
    module = model.get_submodule(site_of(model, layer).name)
    check_texts(texts=texts)
    check_counts(1, batch_size=batch_size)
    check_counts(0, first=first)
    device = next(model.parameters()).device
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])
        raise _Reached

    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Tensor] = {}
    handle = module.register_forward_hook(keep)
    try:
        with evaluating(model):
            for start in range(0, len(texts), batch_size):
                own = by_length[start : start + batch_size]
                batch = padded([texts[i] for i in own], device)
                try:
                    model(**batch, use_cache=False)
                except _Reached:
                    hidden = seen.pop()
                for i, row in zip(own, hidden, strict=True):
                    found[i] = row[first : len(texts[i])].float()
    finally:
        handle.remove()
    return (found[i] for i in range(len(texts)))
