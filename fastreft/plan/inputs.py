"""Reading what a forward was given, by the calling conventions of Transformers' models (4.57 and 5)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

Given = dict[str, Any]
_CACHES = ("past_key_values", "cache_params", "mems", "state")  # what models call their cache


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Given) -> Given:
    """The arguments of a forward, all by name."""
    if not args:
        return kwargs
    names = inspect.signature(type(module).forward).parameters
    return dict(zip(names, (module, *args), strict=False), **kwargs)


def batch_shape(given: Given) -> tuple[int, int] | None:
    """(B, S) of the tokens or embeddings; None where the input is something else."""
    entry = source_of(given)
    return (entry.shape[0], entry.shape[1]) if isinstance(entry, Tensor) and entry.ndim > 1 else None


def source_of(given: Given) -> Tensor | None:
    """The tokens (B, S), or the embeddings (B, S, d); None where the input is something else."""
    return given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]


def flattened(given: Given) -> Given:
    """With the choices of a question (B, choices, S) as samples of their own, as the blocks see them."""
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 3:
        return given
    return {
        name: value.flatten(0, 1) if isinstance(value, Tensor) and value.shape == ids.shape else value
        for name, value in given.items()
    }


def cache_of(given: Given) -> Any:
    """The key-value cache, or None."""
    return next((given[name] for name in _CACHES if given.get(name) is not None), None)


def cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds: a ``Cache``, or tuples a layer; a static one waits for its device to say."""
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # none of its layers has attention, so none counts
            return int(cache.has_previous_state())
    if not isinstance(cache, (tuple, list)) or not cache or cache[0] is None:
        return 0
    return cache[0][0].shape[-2]


def attention_mask(given: Given) -> Tensor | None:
    """The attention mask; of several, one a kind of layer, any, as each hides the padding."""
    mask = given.get("attention_mask")
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    return mask if isinstance(mask, Tensor) else None  # flex attention has an object of its own


def has_shorter_blocks(module: nn.Module) -> bool:
    """Does a model say that convolutions shorten its input before the blocks, as those of sound do?"""
    return hasattr(module, "_get_feat_extract_output_lengths")


def shortened(module: Any, mask: Tensor | None, columns: int) -> Tensor | None:
    """A mask over samples or mel frames as one over the ``columns`` that the blocks of such a model see; others as is.

    The model says how many of them come of so many samples; they come first, as these models pad on the right.
    """
    if mask is None or mask.ndim != 2 or mask.shape[1] == columns or not has_shorter_blocks(module):
        return mask
    lengths = module._get_feat_extract_output_lengths
    before_adapter = {"add_adapter": False} if "add_adapter" in inspect.signature(lengths).parameters else {}
    found = lengths(mask.sum(1), **before_adapter)
    if not isinstance(found, Tensor):
        return mask
    hidden = (mask != 0).sum(1) == 0
    return (torch.arange(columns, device=mask.device) < found[:, None]) & ~hidden[:, None]


def marks(given: Given) -> tuple[Tensor | None, ...]:
    """What can say that several sequences are packed into a row: ``cu_seq_lens_q``, ``seq_idx`` and ``position_ids``."""
    bounds = given.get("cu_seq_lens_q")
    return bounds if isinstance(bounds, Tensor) else None, given.get("seq_idx"), given.get("position_ids")


def packing(
    mask: Tensor | None, marks: tuple[Tensor | None, ...], shape: tuple[int, int]
) -> tuple[Tensor | None, int | None]:
    """Which tokens start a sequence, bool (B, S), and how many sequences there are where that is said; None, None if one.

    As Transformers has it, a row is packed where bounds, owners or jumps in the places say so, and no (B, S) attention
    mask is given, which would let the sequences see each other.
    """
    bounds, owners, places = marks
    if mask is not None and mask.ndim == 2:
        return None, None
    if places is not None and places.ndim == 3:  # multimodal: the first of four is the text's, of three none is
        places = places[0] if len(places) == 4 else None
    if bounds is not None:
        flat = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.bool, device=bounds.device)
        jumps = flat.scatter(0, bounds.long(), True)[:-1].view(shape)[:, 1:]
    elif owners is not None and tuple(owners.shape) == shape:
        jumps = owners[:, 1:] != owners[:, :-1]
    elif places is not None and places.shape[-1] == shape[1]:
        jumps = (places[:, 1:] != places[:, :-1] + 1).expand(shape[0], -1)
    else:
        return None, None
    return nn.functional.pad(jumps, (1, 0), value=True), None if bounds is None else len(bounds) - 1
