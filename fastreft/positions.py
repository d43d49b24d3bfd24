"""Which tokens an edit touches: "f5+l5" and its friends, turned into an index of rows.

    positions = parse("f5+l5")                       # the first 5 and the last 5 tokens of the prompt
    prompt = prompt_mask((B, S), attention_mask, labels)
    index = rows(positions, (B, S), prompt)          # (B, 10) int64 into hidden.reshape(B * S, d); -1 = skip

With the prompt L tokens long, fN+lM takes f = min(N, floor(L / 2)) tokens from its start and l = min(M, ceil(L / 2))
from its end; fN or lM alone takes min(N, L). Source: ReFT (Wu et al. 2024, arXiv 2404.03592), section 4;
``pyreft_compat`` floors both, alone or together, as pyreft's ``get_intervention_locations`` does. The shapes are fixed
by N, M, B and S, so nothing here waits for the device. Imports torch alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

ACCEPTED = "'fN', 'lM', 'fN+lM' (N, M >= 1, such as 'f5+l5'), 'prompt' or 'all'"


@dataclass(frozen=True, eq=False)  # parse() gives one object a text, so that telling two apart costs nothing
class Positions:
    """``first`` N and ``last`` M tokens of the prompt; where both are 0, all of it; or ``everywhere``: every token."""

    first: int = 0
    last: int = 0
    everywhere: bool = False
    pyreft_compat: bool = False

    @property
    def two_sided(self) -> bool:
        """Is there a prefix and a suffix, which can have an intervention each (untied)?"""
        return self.first > 0 and self.last > 0


@lru_cache
def parse(text: str, *, pyreft_compat: bool = False) -> Positions:
    """The :class:`Positions` of fN, lM, fN+lM (in either order), prompt or all; ``ValueError`` for another text."""
    if text == "all":
        return Positions(everywhere=True)
    if text == "prompt":
        return Positions()
    counts: dict[str, int] = {}
    for part in text.split("+") if isinstance(text, str) else [""]:
        match = re.fullmatch(r"([fl])([1-9][0-9]*)", part)
        if match is None or match[1] in counts:
            raise ValueError(f"positions is {text!r}; it must be {ACCEPTED}")
        counts[match[1]] = int(match[2])
    return Positions(counts.get("f", 0), counts.get("l", 0), pyreft_compat=pyreft_compat)


def prompt_mask(
    shape: tuple[int, int], attention_mask: Tensor | None = None, labels: Tensor | None = None
) -> Tensor | None:
    """Which tokens belong to the prompt: (B, S) bool, or None for all of them.

    The prompt is what ``attention_mask`` shows before the first label other than -100; a sample without such a label
    is all prompt. ``attention_mask`` is (B, S), non-zero = shown, or (B, heads, queries, keys) as attention takes it
    (bool, or additive with 0 = shown), where a token is shown that sees itself. ``labels`` is (B, S). Raises
    ``ValueError`` for other shapes.
    """
    prompt = None
    if attention_mask is not None:
        seen = attention_mask
        if seen.ndim == 4 and seen.shape[2] in (1, shape[1]):
            seen = seen[:, 0].expand(shape[0], shape[1], -1).diagonal(dim1=1, dim2=2)
            seen = seen if seen.dtype == torch.bool else seen == 0
        prompt = _check(seen != 0, shape, "attention_mask")
    if labels is not None:
        unanswered = _check(labels != -100, shape, "labels").cumsum(1) == 0
        prompt = unanswered if prompt is None else prompt & unanswered.to(prompt.device)
    return prompt


def _check(value: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; the positions need one entry a token, {shape}: "
            "pass it so, or say which tokens to edit with reft_positions"
        )
    return value


def rows(
    positions: Positions, shape: tuple[int, int], prompt: Tensor | None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """The rows to edit of the flattened hidden state: int64 (B, n), -1 = skip; None for every row.

    ``prompt`` is :func:`prompt_mask`'s. n is N + M for fN+lM, prefix first, and S for the whole prompt.
    A sample's prompt may lie anywhere (left, right or no padding): places are counted by rank, not by column.
    """
    if positions.everywhere or (prompt is None and not positions.first and not positions.last):
        return None
    batch, length = shape
    row = torch.arange(batch * length, device=device).view(batch, length)
    if prompt is None:
        prompt = torch.ones(shape, dtype=torch.bool, device=device)
    prompt = prompt.to(device)
    if not positions.first and not positions.last:
        return row.masked_fill(~prompt, -1)
    rank = prompt.cumsum(1)
    total = rank[:, -1:]
    half = total // 2
    if positions.pyreft_compat:
        from_start, from_end = half, half
    elif positions.two_sided:
        from_start, from_end = half, total - half
    else:
        from_start, from_end = total, total
    places = positions.first + positions.last
    rank = rank - 1
    in_suffix = rank - total + from_end.clamp(max=positions.last)
    # Each chosen token has a place of its own; all others share one place at the end, which is cut off.
    place = torch.full_like(rank, places)
    place = torch.where(in_suffix >= 0, in_suffix + positions.first, place)
    place = torch.where(rank < from_start.clamp(max=positions.first), rank, place)
    place = place.masked_fill(~prompt, places)
    return row.new_full((batch, places + 1), -1).scatter_(1, place, row)[:, :places]


def explicit_rows(index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows of per-sample columns ``index`` (B, n): int64 (B, n), negative = skip, each column once.

    Columns count from the start of the padded sequence. With fewer samples than B (beams, several sequences a
    prompt) each sample stands for B / samples consecutive ones. Raises ``ValueError`` for another shape or dtype and,
    on a CPU, ``IndexError`` for a column past the end; on a GPU that is skipped, as a report would need a sync.
    """
    batch, length = shape
    integers = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if not integers or index.ndim != 2 or index.shape[0] == 0 or batch % index.shape[0]:
        raise ValueError(
            f"reft_positions has shape {tuple(index.shape)} and dtype {index.dtype}; "
            f"it must be integers of shape (batch, n), here ({batch}, n)"
        )
    if index.device.type == "cpu" and index.numel() and int(index.max()) >= length:
        raise IndexError(f"reft_positions holds {int(index.max())}, past the last of {length} tokens")
    index = index.long().repeat_interleave(batch // index.shape[0], 0).sort(1).values
    skip = (index < 0) | (index >= length)
    skip[:, 1:] |= index[:, 1:] == index[:, :-1]
    start = torch.arange(0, batch * length, length, device=index.device)[:, None]
    return (index + start).masked_fill(skip, -1)
