"""Which tokens an edit touches: "f5+l5" and its friends, turned into an index of rows.

    spec = parse("f5+l5")                              # spec.py: the first 5 and the last 5 tokens of the prompt
    tokens = tokens_of((B, S), attention_mask, labels)
    (index,) = rows(spec, tokens)                      # (B, 10) int64 into hidden.reshape(B * S, d); -1 = skip

With the prompt L tokens long, fN+lM takes f = min(N, floor(L / 2)) tokens from its start and l = min(M, ceil(L / 2))
from its end; fN or lM alone takes min(N, L). Source: ReFT (Wu et al. 2024, arXiv 2404.03592), section 4;
``pyreft_compat`` floors both, alone or together, as pyreft's ``get_intervention_locations`` does. The shapes are fixed
by N, M, B and S, so nothing here waits for a GPU. On a CPU a native op finds the rows of plain batches in one pass.
dK and a:b count tokens from 0 over all that are written, or shown; what comes after a cache, ``numbers.py`` counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import prompts
from .hooks import traced
from .spec import Positions, Tied


@dataclass
class Tokens:
    """What is known of the tokens of a batch, (B, T), and which columns of it a forward runs.

    ``mask`` (B, T), non-zero = shown, None = all; ``labels`` (B, T), None = no answer; ``starts`` bool (B, T), the first
    token of each of several sequences packed into a row, None = one sequence a row, of which there are at most
    ``sequences`` (None = not known). ``window`` (start, S), None = (0, T).
    """

    shape: tuple[int, int]
    mask: Tensor | None = None
    labels: Tensor | None = None
    starts: Tensor | None = None
    sequences: int | None = None
    window: tuple[int, int] | None = None

    @property
    def prompt(self) -> Tensor | None:
        """Bool (B, T): shown, and before the first label other than -100 of its sequence; None = all."""
        if self._labelled is None:
            return self.shown
        unanswered = _count(self._labelled, self.starts) == 0
        return unanswered if self.shown is None else self.shown & unanswered.to(self.shown.device)

    @property
    def written(self) -> Tensor | None:
        """Bool (B, T): shown, with a label other than -100; None = none."""
        if self._labelled is None or self.shown is None:
            return self._labelled
        return self.shown & self._labelled.to(self.shown.device)

    @property
    def shown(self) -> Tensor | None:
        """Bool (B, T); None = all."""
        return None if self.mask is None else self.mask != 0

    @property
    def _labelled(self) -> Tensor | None:
        return None if self.labels is None else self.labels != -100


PACKED = (
    "reft_prompt_lengths has one number a sample, and position_ids (or other marks) say that several sequences are packed into "
    "a sample: give reft_labels, which say where the prompt of each ends"
)


def tokens_of(
    shape: tuple[int, int],
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    starts: Tensor | None = None,
    sequences: int | None = None,
) -> Tokens:
    """The :class:`Tokens` of one forward over whole sequences.

    The prompt is what ``attention_mask`` shows of a sequence before its first label other than -100; a sequence without
    such a label is all prompt, one that is hidden has none. Written are the shown tokens with a label other than -100.
    ``attention_mask`` is (B, S), non-zero = shown, or (B, heads, queries, keys) as attention takes it (bool, or additive
    with 0 = shown), where a token is shown that sees itself. ``labels`` is (B, S). ``ValueError`` for other shapes.
    """
    if attention_mask is not None and attention_mask.ndim == 4 and attention_mask.shape[2] in (1, shape[1]):
        attention_mask = attention_mask[:, 0].expand(shape[0], shape[1], -1).diagonal(dim1=1, dim2=2)
        if attention_mask.dtype != torch.bool:
            attention_mask = attention_mask == 0
    for name, value in (("attention_mask", attention_mask), ("labels", labels)):
        if value is not None and value.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; the positions need one entry a token, {shape}: "
                "pass it so, or say which tokens to edit with reft_positions"
            )
    return Tokens(shape, attention_mask, labels, starts, sequences)


def _count(chosen: Tensor, starts: Tensor | None) -> Tensor:
    """How many are chosen up to and with each token, in its own sequence; int64 (B, T)."""
    count = chosen.cumsum(1)
    if starts is None:
        return count
    before = (count - chosen.long()).masked_fill(~starts.to(count.device), 0)
    return count - before.cummax(1).values


def _total(count: Tensor, starts: Tensor | None) -> Tensor:
    """The count at the end of each token's sequence: (B, 1), or (B, T) where sequences are packed."""
    if starts is None:
        return count[:, -1:]
    goes_on = torch.nn.functional.pad(~starts[:, 1:].to(count.device), (0, 1))  # is the next token of this sequence?
    last = count.shape[1] - 1
    ends = torch.arange(last + 1, device=count.device).expand_as(count).masked_fill(goes_on, last)
    return count.gather(1, ends.flip(1).cummin(1).values.flip(1))


_CPU = torch.device("cpu")


def rows(positions: Positions, tokens: Tokens, tied: Tied = True, device: torch.device = _CPU) -> list[Tensor | None]:
    """The rows to edit of the flattened hidden state (B, S, d), for each intervention of ``positions.shares(tied)``.

    Each is int64 (B, n), -1 = skip, no row twice; or None for every row; none is listed where no token can be meant.
    n is the intervention's share of N + M, prefix first; K of dK, b - a of a:b, at most T; T for kinds with no fixed number;
    and for packed rows such a number times ``tokens.sequences``, at most T (where looking is free, on a CPU, the sequences
    are counted). Places are counted by rank, not by column, so padding may lie anywhere.
    """
    if positions.numbered:
        return _numbered(positions, tokens, device)
    if positions.everywhere:
        return [None]
    if not positions.places:
        chosen = tokens.written if positions.written else tokens.prompt
        if chosen is None:
            return [] if positions.written else [None]
        return [windowed(listed(chosen.to(device)), tokens)]
    if tied != "position":  # more places than there are tokens would hold -1 alone, and cost memory
        positions = positions.within(tokens.shape[1])
    size = positions.places
    shares = positions.shares(tied)
    plain = tokens.starts is None and tokens.window is None
    if plain and prompts.finds_rows(tokens.mask, tokens.labels, device):
        counts = (positions.first, positions.last)
        index = prompts.prompt_rows(tokens.mask, tokens.labels, *tokens.shape, *counts, positions.pyreft_compat)
        return [index] if len(shares) == 1 else [index[:, a:b] for a, b in shares]
    place = _place(positions, tokens, device)
    if tokens.starts is None:
        index = _scatter(place, place < size, size)
        return [windowed(index[:, a:b], tokens) for a, b in shares]
    found: list[Tensor | None] = []
    for a, b in shares:
        chosen = (place >= a) & (place < b)
        found.append(windowed(_scatter(chosen.cumsum(1) - 1, chosen, _most(tokens, b - a, device)), tokens))
    return found


def _most(tokens: Tokens, each: int, device: torch.device) -> int:
    """How many tokens of a row are chosen at most, where ``each`` of its sequences has so many."""
    many = tokens.sequences if tokens.starts is not None else 1
    if many is None and device.type == "cpu" and not torch.compiler.is_compiling():
        many = int(tokens.starts.sum(1).max())  # type: ignore[union-attr]
    return tokens.shape[1] if many is None else min(tokens.shape[1], many * each)


def _numbered(positions: Positions, tokens: Tokens, device: torch.device) -> list[Tensor | None]:
    """The rows of the tokens with the numbers that are meant, of all that are shown or of those that are written."""
    meant = tokens.written if positions.written else tokens.shown
    if meant is None and positions.written:
        return []
    meant = torch.ones(tokens.shape, dtype=torch.bool, device=device) if meant is None else meant.to(device)
    number = _count(meant, tokens.starts) - 1
    chosen = meant & (number >= positions.begin)
    if positions.end is None:
        return [windowed(listed(chosen), tokens)]
    chosen = chosen & (number < positions.end)
    most = _most(tokens, positions.end - positions.begin, device)
    return [windowed(_scatter(chosen.cumsum(1) - 1, chosen, most), tokens)]


def _place(positions: Positions, tokens: Tokens, device: torch.device) -> Tensor:
    """Each token's place among the N + M that its sequence has, N + M for a token that is not chosen; int64 (B, T).

    The k-th token from the start has place k, the k-th from the end place N + M - k, however short the prompt.
    """
    prompt = tokens.prompt
    prompt = torch.ones(tokens.shape, dtype=torch.bool, device=device) if prompt is None else prompt.to(device)
    count = _count(prompt, tokens.starts)
    total = _total(count, tokens.starts)
    half = total // 2
    if positions.pyreft_compat:
        from_start, from_end = half, half
    elif positions.first and positions.last:
        from_start, from_end = half, total - half
    else:
        from_start, from_end = total, total
    to_end = total - count  # 0 for the last token
    place = torch.full_like(count, positions.places)
    place = torch.where(to_end < from_end.clamp(max=positions.last), positions.places - 1 - to_end, place)
    place = torch.where(count <= from_start.clamp(max=positions.first), count - 1, place)
    return place.masked_fill(~prompt, positions.places)


def listed(chosen: Tensor) -> Tensor:
    """The rows of the chosen tokens, each at its own column, (B, T)."""
    row = torch.arange(chosen.numel(), device=chosen.device).view(chosen.shape)
    return row.masked_fill(~chosen, -1)


def _scatter(place: Tensor, chosen: Tensor, n: int) -> Tensor:
    """The rows of the chosen tokens, each at its own place of n, (B, n); the others share a place that is cut off."""
    row = torch.arange(place.numel(), device=place.device).view(place.shape)
    # Made of the places, so that vmap, where these are one of many, has one for each.
    return place.new_full((place.shape[0], n + 1), -1).scatter_(1, place.masked_fill(~chosen, n), row)[:, :n]


def windowed(index: Tensor, tokens: Tokens) -> Tensor:
    """Rows of (B, T) as rows of the columns that this forward runs; -1 for what lies outside them."""
    if tokens.window is None:
        return index
    start, length = tokens.window
    column = index - torch.arange(index.shape[0], device=index.device)[:, None] * tokens.shape[1] - start
    inside = (index >= 0) & (column >= 0) & (column < length)
    first = torch.arange(0, index.shape[0] * length, length, device=index.device)[:, None]
    return (column + first).masked_fill(~inside, -1)


def check_mask(mask: Tensor | None) -> None:
    """``ValueError`` naming a sample of which ``mask`` (B, S) shows no token; a look that only a CPU gives without waiting."""
    if mask is None or mask.ndim != 2 or not mask.is_cpu:
        return
    hidden = prompts.hidden_sample(mask)
    if hidden >= 0:
        raise ValueError(f"attention_mask hides every token of sample {hidden}; each sample must show one at least")


def check_lengths(lengths: Tensor, shape: tuple[int, int], mask: Tensor | None = None) -> None:
    """``ValueError`` where ``lengths`` are not the tokens of the prompts of a (B, T) batch, of which ``mask`` shows some."""
    integers = isinstance(lengths, Tensor) and not (lengths.is_floating_point() or lengths.dtype == torch.bool)
    if not integers or tuple(lengths.shape) != shape[:1]:
        came = (
            f"shape {tuple(lengths.shape)} and dtype {lengths.dtype}" if isinstance(lengths, Tensor) else repr(lengths)
        )
        raise ValueError(f"reft_prompt_lengths has {came}; it must be integers, one a sample, here ({shape[0]},)")
    if lengths.is_cpu and not traced():
        most = (mask != 0).sum(1) if mask is not None and mask.is_cpu else torch.full_like(lengths, shape[1])
        odd = ((lengths < 0) | (lengths > most)).nonzero()
        if len(odd):
            i = int(odd[0])
            raise ValueError(
                f"reft_prompt_lengths holds {int(lengths[i])}; it must be from 0 to the tokens of a sample, here {int(most[i])}"
            )


def fitting(known: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """A mask, or labels, where it has an entry a token; else None."""
    return known if known is not None and tuple(known.shape) == shape else None


def labels_of(lengths: Tensor, mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Labels (B, T) that leave the first ``lengths`` (B,) shown tokens of each sample to the prompt: -100, else 0."""
    shown = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else (mask != 0).to(device)
    return torch.where(shown.cumsum(1) > lengths.to(device)[:, None], 0, -100)


def check_explicit(index: Tensor, shape: tuple[int, int]) -> None:
    """Can ``index`` say columns of a (B, T) batch? See :func:`explicit_rows` for what is raised.

    With several interventions a layer it is (interventions, B, n).
    """
    integers = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if not integers or index.ndim not in (2, 3) or index.shape[-2] == 0 or shape[0] % index.shape[-2]:
        raise ValueError(
            f"reft_positions has shape {tuple(index.shape)} and dtype {index.dtype}; "
            f"it must be integers of shape (batch, n), here ({shape[0]}, n)"
        )
    if index.is_cpu and index.numel() and int(index.max()) >= shape[1]:
        raise IndexError(f"reft_positions holds {int(index.max())}, past the last of {shape[1]} tokens")


def explicit_rows(index: Tensor, tokens: Tokens) -> Tensor:
    """Rows of per-sample columns ``index`` (B, n): int64 (B, n), negative = skip, each column once.

    Columns count from the start of the padded sequence. With fewer samples than B (beams, several sequences a
    prompt) each sample stands for B / samples consecutive ones. Raises ``ValueError`` for another shape or dtype and,
    on a CPU, ``IndexError`` for a column past the end; on a GPU that is skipped, as a report would need a sync.
    """
    check_explicit(index, tokens.shape)
    return windowed(rows_of_columns(index, tokens.shape), tokens)


def rows_of_columns(index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows of columns ``index`` (..., samples, n) in a (B, T) batch: int64 (..., B, n), -1 for what is outside or repeated."""
    batch, length = shape
    index = index.long().repeat_interleave(batch // index.shape[-2], -2).sort(-1).values
    skip = (index < 0) | (index >= length)
    skip[..., 1:] |= index[..., 1:] == index[..., :-1]
    start = torch.arange(0, batch * length, length, device=index.device)[:, None]
    return (index + start).masked_fill(skip, -1)


def rows_in_order(index: Tensor, tokens: Tokens) -> Tensor:
    """As :func:`explicit_rows`, of columns (B, n) or (B,), but in the order given, and none may come twice in a sample."""
    index = index[:, None] if index.ndim == 1 else index
    check_explicit(index, tokens.shape)
    index = index.long().repeat_interleave(tokens.shape[0] // index.shape[0], 0)
    ordered = index.sort(1).values
    if index.is_cpu and bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise ValueError("positions has a column twice in a sample; each may be given once")
    skip = (index < 0) | (index >= tokens.shape[1])
    start = torch.arange(0, tokens.shape[0] * tokens.shape[1], tokens.shape[1], device=index.device)[:, None]
    return windowed((index + start).masked_fill(skip, -1), tokens)
