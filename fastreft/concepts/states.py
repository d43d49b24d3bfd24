"""The hidden states of texts at a layer, without the layers behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..causal.sites import Site, find_site

Text = Sequence[int] | Tensor


class _Reached(Exception):
    """The layer has been run, and nothing behind it is asked for."""


def site_of(model: nn.Module, layer: int) -> Site:
    """Where a layer's output is; ``ValueError`` for a layer that there is not, or whose states do not lie sample by sample."""
    site = find_site(model, layer)
    if site.layout is not None:
        raise ValueError(f"{type(model).__name__} keeps its hidden states otherwise than (batch, tokens, d)")
    return site


def padded(texts: Sequence[Text], device: torch.device) -> dict[str, Tensor]:
    """Token ids and their mask, padded at the end; ``ValueError`` for a text without a token."""
    rows = [torch.as_tensor(text, dtype=torch.int64) for text in texts]
    empty = [i for i, row in enumerate(rows) if row.ndim != 1 or not len(row)]
    if empty:
        raise ValueError(
            f"texts[{empty[0]}] is {tuple(rows[empty[0]].shape)}; a text is its token ids (n,), one at least"
        )
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": pad_sequence(rows, batch_first=True).to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def states(
    model: nn.Module, layer: int, texts: Sequence[Text], *, batch_size: int = 16, first: int = 1
) -> Iterator[Tensor]:
    """The states (n, d), fp32, of each text's tokens behind a layer, without its ``first`` ones; in the order of the texts.

    The model is in evaluation while it runs. ``ValueError`` for a layer that there is not, or an empty text.
    """
    module = model.get_submodule(site_of(model, layer).name)
    device = next(model.parameters()).device
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])
        raise _Reached

    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Tensor] = {}
    mode = model.training
    model.eval()
    handle = module.register_forward_hook(keep)
    try:
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
        model.train(mode)
    return (found[i] for i in range(len(texts)))
