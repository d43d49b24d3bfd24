"""pyreft's unit_locations as rows: which rows of the hidden state each intervention of a forward edits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..interventions import Intervention
from ..ops.subspaces import Choices, Part, parts
from ..ops.subspaces import parse as parse_choices
from ..plan.positions import rows_of_columns


class Locations:
    """What one forward or generate edits: ``index`` (interventions, B, n) columns of the input, -1 = none; None: every token.

    ``prompt`` True edits the prompt alone, False the decode steps alone, None whatever comes.
    """

    def __init__(self, index: Tensor | None, prompt: bool | None = None):
        self.index, self.prompt = index, prompt
        self.subspaces: list[Choices] | None = None  # of each intervention, where some are given
        self.idle = False  # does the forward under way edit nothing?
        self._rows: dict[Any, tuple[Tensor, ...]] = {}
        self._parts: dict[Any, list[Part]] = {}

    def begin(self, decoding: bool) -> None:
        """Note what kind of forward comes: over a prompt, or a decode step."""
        self.idle = self.prompt is decoding

    def rows(self, i: int, shape: tuple[int, int], device: torch.device) -> Tensor | None:
        """The rows (n,) of intervention i in a hidden state of ``shape`` (B, S), each once; None for every row.

        Computed for all interventions at once. With fewer samples than B each stands for as many beams, one after the other.
        A column past the end is an ``IndexError`` on a CPU, and skipped on a GPU, where a report would wait.
        """
        if self.index is None:
            return None
        key = (shape, device)
        found = self._rows.get(key)
        if found is None:
            found = self._rows[key] = self._compute(self.index.to(device), *shape)
        return found[i]

    def parts(self, i: int, intervention: Intervention, shape: tuple[int, int], device: torch.device) -> list[Part]:
        """The same rows by what of the intervention edits them, where there are ``subspaces``."""
        found = self._parts.get((i, shape, device))
        if found is None and self.subspaces is not None:
            whose = f"this {type(intervention).__name__}"
            self.subspaces[i].check(shape[0], beams=True)
            chosen = self.subspaces[i].rows(intervention.partition, intervention.r, whose, shape[0])
            found = parts(self.rows(i, shape, device), chosen, shape[1], device)
            self._parts[i, shape, device] = found
        return found or []

    def _compute(self, index: Tensor, batch: int, length: int) -> tuple[Tensor, ...]:
        samples = index.shape[1]
        if batch % samples:
            raise ValueError(f"unit_locations has locations for {samples} samples; the batch has {batch}")
        if index.is_cpu and index.numel() and int(index.max()) >= length:
            raise IndexError(f"unit_locations holds column {int(index.max())}, past the last of {length} tokens")
        return rows_of_columns(index, (batch, length)).flatten(1).unbind()


def parse(unit_locations: Any, interventions: int, batch: int, prompt: bool | None = None) -> Locations:
    """The :class:`Locations` of pyreft's ``unit_locations``; ``ValueError`` for one that does not fit.

    It is None (every token), or {"sources->base": (None, L)} or {"base": L}, with L nested [intervention][sample][position],
    a tensor of that shape, a list of columns for all, or one column for all. Rows may be of unequal length here.
    """
    if unit_locations is None:
        return Locations(None, prompt)
    if not isinstance(unit_locations, dict) or len(unit_locations) != 1:
        raise ValueError(
            f"unit_locations is {_short(unit_locations)}; it must be {{'sources->base': (None, locations)}}"
        )
    (name, given), *_ = unit_locations.items()
    if name == "sources->base":
        if isinstance(given, tuple):
            if len(given) != 2 or (given[0] is not None and not isinstance(given[0], (int, list))):
                raise ValueError(f"unit_locations[{name!r}] is {_short(given)}; it must be (None, locations)")
            given = given[1]
    elif name != "base":
        raise ValueError(f"unit_locations has the key {name!r}; it must be 'sources->base' or 'base'")
    return Locations(_index(given, interventions, batch), prompt)


def parse_subspaces(given: Any, interventions: int, batch: int) -> list[Choices]:
    """pyvene's ``subspaces`` for each intervention: nested [intervention][sample][row], a tensor of that shape, a list of rows
    for all, or one for all; rows are numbers of groups where the intervention has a ``subspace_partition``."""
    if type(given) is int:
        given = [given]
    if isinstance(given, (list, tuple)) and given and all(type(row) is int for row in given):
        return [Choices((tuple(given),), one=True)] * interventions
    depth = given.ndim if isinstance(given, Tensor) else _depth(given)
    if depth != 3 or len(given) != interventions:
        raise ValueError(
            f"subspaces is {_short(given)}; it must be rows, nested [intervention][sample][row], for {interventions} "
            "interventions, or a list of rows for all"
        )
    found = [parse_choices(samples) for samples in given]
    for choices in found:
        if not choices.samples or batch % len(choices.samples):
            raise ValueError(f"subspaces has rows for {len(choices.samples)} samples; the batch has {batch}")
    return found


def _index(given: Any, interventions: int, batch: int) -> Tensor:
    if isinstance(given, int):
        given = [given]
    if isinstance(given, (list, tuple)):
        depth = _depth(given)
        if depth == 1:
            return torch.tensor(given, dtype=torch.long).expand(interventions, batch, -1)
        if depth == 3:
            given = _rectangle(given)
    if not isinstance(given, Tensor) or given.is_floating_point() or given.ndim != 3 or len(given) != interventions:
        raise ValueError(
            f"unit_locations holds {_short(given)}; it must be integers, nested [intervention][sample][position], "
            f"for {interventions} interventions"
        )
    if given.shape[1] == 0 or batch % given.shape[1]:
        raise ValueError(f"unit_locations has locations for {given.shape[1]} samples; the batch has {batch}")
    return given


def _depth(given: Any) -> int:
    depth = 0
    while isinstance(given, (list, tuple)):
        if not given:
            return depth + 1
        depth, given = depth + 1, given[0]
    return depth


def _rectangle(given: Any) -> Any:
    """A tensor of nested lists, rows of unequal length filled up with -1; the lists themselves where that is impossible."""
    try:
        longest = max(len(row) for samples in given for row in samples)
        return torch.tensor([[[*row, *[-1] * (longest - len(row))] for row in samples] for samples in given])
    except (TypeError, ValueError):
        return given


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) < 100 else f"{text[:97]}..."
