"""Interchange interventions: a forward in which a hidden state takes, in a subspace, the coordinates that it has for a source.

    with interchange(model, {8: (base positions, source, source positions)}, subspace):
        logits = model(**base).logits

What is exchanged is h + R^T (R s - R h) at each position (``fastreft.functional.interchange``), or all of h without a subspace.
Source: Geiger et al. 2021 (arXiv 2106.02997) and 2023 (arXiv 2303.02536).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.edit import NEW
from ..ops.edit import interchange as ops_interchange
from ..plan.forward import Plan
from .sites import Act, Attached, Place, Site, Where, find_site, rows_at
from .subspace import Subspace, check_variables


@dataclass(frozen=True)
class Kept:
    """Hidden states that were collected, ``values`` (B, n, d): n positions of each sample. They stand for a source."""

    values: Tensor


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs: ``inputs`` are its keywords, its arguments in a tuple, or its one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def collect(model: nn.Module, inputs: Any, places: Mapping[Place, Where], *, grad: bool = False) -> dict[Place, Kept]:
    """The hidden states of one forward at some positions of some places; without gradients unless ``grad``.

    ``ValueError`` for a position that a sample has not, and for a place that the forward does not reach.
    """
    return collect_each(model, [inputs], {place: (place, where) for place, where in places.items()}, grad=grad)


def collect_each(
    model: nn.Module, batches: Iterable[Any], wanted: Mapping[Any, tuple[Place, Where]], *, grad: bool = False
) -> dict[Any, Kept]:
    """The same of several batches, one after the other, by keys of the caller's: of which place, and of which positions."""
    sites = {key: (find_site(model, place), where) for key, (place, where) in wanted.items()}
    attached = Attached(model, [site for site, _ in sites.values()])
    try:
        found = [_collected(model, attached, inputs, sites, grad) for inputs in batches]
    finally:
        attached.remove()
    return {key: Kept(torch.cat([each[key].values for each in found])) for key in wanted}


def _collected(
    model: nn.Module, attached: Attached, inputs: Any, wanted: Mapping[Any, tuple[Site, Where]], grad: bool
) -> dict[Any, Kept]:
    """The hidden states at sites that are attached, by a key of the caller's: at which site, and at which positions."""
    found: dict[Any, Kept] = {}

    def keep(site: Site, plan: Plan, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        for key in [key for key, (at, _) in wanted.items() if at == site]:
            rows = rows_at(wanted[key][1], site, plan, hidden, "source")
            found[key] = Kept(flat[rows] if grad else flat[rows].detach())
        return hidden

    before = attached.act
    attached.act = dict.fromkeys((site for site, _ in wanted.values()), keep)
    try:
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            call(model, inputs)
    finally:
        attached.act = before
    for key, (site, _) in wanted.items():
        if key not in found:
            raise ValueError(f"nothing was collected at {site.name}: the model's forward did not reach it")
    return found


@dataclass(frozen=True)
class Exchange:
    """What is done at one site of ``attached``: the hidden states at ``where`` take ``sources``, by variable, in the
    subspace, or as a whole."""

    where: Where
    sources: Mapping[str, Kept]
    subspace: Subspace | None
    attached: Attached

    def __call__(self, site: Site, plan: Plan, hidden: Tensor) -> Tensor:
        index = rows_at(self.where, site, plan, hidden, "base")
        where = plan.where if site.fresh and not site.at_input else NEW
        for variable, kept in self.sources.items():
            source, rows = self._source(kept, index, hidden), index.reshape(-1)
            if self.subspace is None:
                hidden = ops_interchange(hidden, source, None, None, rows, where)
            else:
                hidden = self.subspace(hidden, source, variable, rows=rows, where=where)
        return hidden

    def _source(self, kept: Kept, index: Tensor, hidden: Tensor) -> Tensor:
        """A source's rows, one for each of the base's."""
        samples, count, width = kept.values.shape
        batch, n = index.shape
        fits = not batch % samples if self.attached.generates else samples in (1, batch)
        if count != n or not fits or width != hidden.shape[-1]:
            raise ValueError(
                f"the source is {tuple(kept.values.shape)} (samples, positions, d); for {batch} samples with {n} positions "
                f"of {hidden.shape[-1]} it must be ({batch}, {n}, {hidden.shape[-1]}), or one sample for all"
            )
        return kept.values.to(hidden.device).repeat_interleave(batch // samples, 0).reshape(-1, width)


@contextmanager
def interchange(
    model: nn.Module, exchanges: Mapping[Place, Any], subspace: Subspace | Tensor | None = None
) -> Iterator[None]:
    """Within it the model's forwards run with their hidden states at some places exchanged for those of sources.

    ``exchanges``: place -> (base positions, source, source positions), or a list of such; the base's positions are the source's
    where there are but two, and a fourth is a subspace of its own. A source is inputs of the model, which are run once, without
    gradients and exchanges, or what :func:`collect` kept, through which gradients flow. It has as many samples as the base,
    or one for all. For several variables of one subspace it is {variable: source}. ``subspace``: a :class:`Subspace`, a
    matrix R (r, d), or None: the whole hidden state. Decoded tokens are left alone.

    ``ValueError`` for what does not fit, for a sample without such a token, and where no forward reached a place.
    """
    sites = {place: find_site(model, place) for place in exchanges}
    asked = [
        (sites[place], _Asked(place, each, subspace))
        for place, given in exchanges.items()
        for each in (given if isinstance(given, list) else [given])
    ]
    attached = Attached(model, list(sites.values()))
    try:
        _run_sources(model, attached, asked)
        for site in sites.values():
            attached.act[site] = _in_turn([each.exchange(attached) for at, each in asked if at == site])
        attached.ran.clear()
        yield
        for site in attached.act.keys() - attached.ran:
            raise ValueError(f"nothing was exchanged at {site.name}: no forward of the model reached it")
    finally:
        attached.remove()


class _Asked:
    """An exchange as a user has it: sources by variable, "" where there is but one."""

    def __init__(self, place: Place, given: Any, common: Any):
        if not isinstance(given, tuple) or not 2 <= len(given) <= 4:
            raise ValueError(
                f"exchanges[{place!r}] must be (base positions, source, source positions), or a list of such"
            )
        self.where, source = given[:2]
        self.source_where = given[2] if len(given) > 2 else self.where
        own = given[3] if len(given) > 3 else common
        if not (own is None or isinstance(own, (Tensor, Subspace))):
            raise ValueError(f"subspace is {own!r}; it must be a Subspace, a matrix (r, d), or None")
        self.subspace: Subspace | None = Subspace.of(own) if isinstance(own, Tensor) else own
        self.sources: dict[str, Any] = {"": source}
        if isinstance(source, Mapping) and _by_variable(source, self.subspace):
            self.sources = dict(source)
            check_variables(self.sources, self.subspace, f"exchanges[{place!r}] has")

    def exchange(self, attached: Attached) -> Exchange:
        return Exchange(self.where, self.sources, self.subspace, attached)


def _by_variable(source: Mapping[str, Any], subspace: Subspace | None) -> bool:
    """Is it {variable: source}, and not a model's inputs, which are no inputs again?"""
    named = subspace is not None and any(name in subspace.variables for name in source)
    return named or all(isinstance(each, (Kept, Mapping)) for each in source.values())


def _in_turn(exchanges: list[Exchange]) -> Act:
    def act(site: Site, plan: Plan, hidden: Tensor) -> Tensor:
        for exchange in exchanges:
            hidden = exchange(site, plan, hidden)
        return hidden

    return act


def _run_sources(model: nn.Module, attached: Attached, asked: list[tuple[Site, _Asked]]) -> None:
    """Run every source that is inputs, each once for all that have it, and put in its place what was kept."""
    uses: dict[int, list[tuple[Site, _Asked, str]]] = {}
    for site, each in asked:
        for variable, source in each.sources.items():
            if not isinstance(source, Kept):
                uses.setdefault(id(source), []).append((site, each, variable))
    for used in uses.values():
        wanted = {i: (site, each.source_where) for i, (site, each, _) in enumerate(used)}
        kept = _collected(model, attached, used[0][1].sources[used[0][2]], wanted, False)
        for i, (_, each, variable) in enumerate(used):
            each.sources[variable] = kept[i]
