"""How a hidden state lies in memory where it is not (B, S, d): which of its rows are a token's.

A layout takes the row numbers of a hidden state, ``grid`` = arange over all dimensions but the last, and the length S of
the model's input (None where that is unknown), and gives the numbers that are the tokens', int64 (B, S, k). Imports
torch alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Layout = Callable[[Tensor, int | None], Tensor]


def sequence_first(grid: Tensor, length: int | None) -> Tensor:
    """(S, B, d)."""
    return grid.T[..., None]


def padded(grid: Tensor, length: int | None) -> Tensor:
    """(B, S + more, d): the model pads what it is given to a multiple."""
    return grid[:, :length, None]


def streams_behind(grid: Tensor, length: int | None) -> Tensor:
    """(B, k * S, d): k streams one after the other, all edited alike."""
    return grid.view(grid.shape[0], -1, length or grid.shape[1]).transpose(1, 2)


def prefixed(grid: Tensor, length: int | None) -> Tensor:
    """(B, more + S, d): the model puts embeddings of its own before the tokens'."""
    return grid[:, grid.shape[1] - length if length else 0 :, None]


def many_streams(grid: Tensor, length: int | None) -> Tensor:
    """(B, S, k, d): k residual streams a token, all edited alike; what a block computes between is (B, S, d)."""
    return grid if grid.ndim == 3 else grid[..., None]


def first_stream(grid: Tensor, length: int | None) -> Tensor:
    """(k, B, S, d): k predictions of the residual stream, of which the first is the one that a block computes on."""
    return (grid[0] if grid.ndim == 3 else grid)[..., None]


def flattened(grid: Tensor, length: int | None) -> Tensor:
    """(B * S, d), which a part of the block gives; what the block and its other parts give is (B, S, d)."""
    return grid.view(-1, length or 1, 1)


# By the model type of the config that the blocks are made from.
_LAYOUTS: dict[str, Layout] = {
    "big_bird": padded,
    "bigbird_pegasus": padded,
    "cpmant": prefixed,
    "deepseek_v4": many_streams,
    "fsmt": sequence_first,
    "gemma3n_text": first_stream,
    "git": prefixed,
    "hy_v4": many_streams,
    "led": padded,
    "longformer": padded,
    "opt": flattened,
    "pegasus_x": padded,
    "prophetnet": streams_behind,
    "qwen4_exp_text": many_streams,
    "xlnet": sequence_first,
}


def layout_of(model_type: str) -> Layout | None:
    """The layout of the models of a type; None for (B, S, d)."""
    return _LAYOUTS.get(model_type)


def places(layout: Layout, hidden: Tensor, length: int | None) -> Tensor:
    """The rows of ``hidden.reshape(-1, d)`` that are the tokens', int64 (B, S, k) on its device."""
    shape = hidden.shape[:-1]
    return layout(torch.arange(shape.numel(), device=hidden.device).view(shape), length)


def take(places: Tensor, rows: Tensor | None) -> Tensor:
    """The rows in memory of tokens ``rows`` (n,) counted as b * S + s, -1 = skip, None = all: int64 (n * k,)."""
    if rows is None:
        return places.reshape(-1)
    found = places.flatten(0, 1)[rows.clamp(min=0)]
    return found.masked_fill((rows < 0)[:, None], -1).reshape(-1)
