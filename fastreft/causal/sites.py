"""Places in a model's forward, and the hooks that hang there: a hidden state, and which rows of it are some positions'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import blocks, layouts
from ..models.components import COMPONENTS
from ..models.layouts import Layout
from ..plan import hooks, positions
from ..plan.forward import Plan, Shared
from ..plan.spec import parse

Place = int | str | tuple[Any, str]
"""A layer (its block's output), (layer, component), the name of any module (its output), or (name, "input")."""

Where = str | int | Sequence[Any] | Tensor | None
"""Positions, alike under any padding: words as in a configuration ("l1", "f2+l2", "all"); an integer k, the k-th token that the
attention mask shows, from the end where it is below 0; a list of such; or columns of the padded input, a tensor (B, n) or (B,),
-1 = none. None is all of them."""

_WHOLE = ("block_output", "block_input")


class Site(NamedTuple):
    """A module's output, or its input, and how hidden states lie there (None: (B, S, d), or (B, d) for a sample each)."""

    name: str
    at_input: bool
    layout: Layout | None
    fresh: bool  # is its output nobody else's, so that it can be changed in place?


def find_site(model: nn.Module, place: Place) -> Site:
    """The site of a place; ``ValueError`` for a layer, a component or a module that there is not."""
    at, component = place if isinstance(place, tuple) else (place, None)
    if isinstance(at, str):
        try:
            module = model.get_submodule(at)
        except AttributeError:
            raise ValueError(f"place is {place!r}; this {type(model).__name__} has no module {at!r}") from None
        if module is model or component not in (None, "input", "output"):
            raise ValueError(f"place is {place!r}; give the name of a module within the model, or (name, 'input')")
        return Site(at, component == "input", _layout(model, at), False)
    component = component or "block_output"
    if component not in (*_WHOLE, *COMPONENTS):
        raise ValueError(f"component is {component!r}; it must be one of {', '.join((*_WHOLE, *COMPONENTS))}")
    found = blocks.find_blocks(model)
    if isinstance(at, bool) or not isinstance(at, int) or not -len(found.names) <= at < len(found.names):
        raise ValueError(f"layer is {at!r}; it must be an integer below {len(found.names)}, the layers of this model")
    name, block = found.names[at], found.modules[at]
    if component in COMPONENTS:
        name, _ = blocks.component_of(name, block, component)
    return Site(name, component == "block_input", _layout(model, name), component in _WHOLE)


def _layout(model: nn.Module, name: str) -> Layout | None:
    kinds = (getattr(config, "model_type", "") for config in blocks.configs_above(model, name))
    return next(filter(None, map(layouts.layout_of, kinds)), None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode; behind it every module has its own mode again, where they differ, too."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


Act = Callable[[Site, Plan, Tensor], Tensor]


class Attached:
    """Hooks at some sites of a model, until :meth:`remove`. ``act`` says what is done there, by site; where it has nothing,
    or a forward has nothing but decoded tokens, nothing is. ``ran``: the sites that something was done at."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]):
        self.act: dict[Site, Act] = {}
        self.ran: set[Site] = set()
        self.shared = Shared(model, [site.name for site in sites])
        self._hung: list[tuple[nn.Module, Any, bool]] = []
        for site in dict.fromkeys(sites):
            module = model.get_submodule(site.name)
            look = site.fresh and not site.at_input and not blocks.makes_its_output(module)
            handle = hooks.hang(
                module,
                self.shared.local,
                partial(self._run, site),
                at_input=site.at_input,
                prepend=not site.at_input,
                look=look,
            )
            self._hung.append((module, handle, site.at_input))

    def _run(self, site: Site, _module: nn.Module, plan: Plan, hidden: Tensor) -> Tensor:
        act = self.act.get(site)
        if act is None:
            return hidden
        if not isinstance(hidden, Tensor) or hidden.ndim < 2:
            raise ValueError(
                f"{site.name} has no hidden state: it gives {type(hidden).__name__}, and no (batch, ..., d)"
            )
        self.ran.add(site)
        return act(site, plan, hidden)

    def remove(self) -> None:
        for module, handle, at_input in self._hung:
            hooks.take_down(module, handle, at_input=at_input)
        self.shared.take_off()
        self._hung.clear()


def rows_at(where: Where, site: Site, plan: Plan, hidden: Tensor) -> Tensor:
    """The rows of hidden.reshape(-1, d) that are some positions', int64 (B, n) in the order given, -1 = not there."""
    if site.layout is None or (site.layout is layouts.flattened and hidden.ndim > 2):
        return _rows(where, plan, hidden.shape[0], hidden.shape[1] if hidden.ndim > 2 else 1, hidden.device)
    places = layouts.places(site.layout, hidden, plan.length)
    rows = _rows(where, plan, places.shape[0], places.shape[1], hidden.device)
    return layouts.take(places, rows.reshape(-1)).view(rows.shape[0], -1)


def _rows(where: Where, plan: Plan, batch: int, length: int, device: torch.device) -> Tensor:
    assert plan.tokens is not None  # a plan of decoded tokens is idle, and does not come here
    tokens = plan.tokens(batch, length, device)
    if isinstance(where, Tensor):
        return positions.rows_in_order(where.to(device), tokens)
    parts = where if isinstance(where, (list, tuple)) else [where]
    return torch.cat([_of_one(part, tokens, device) for part in parts], 1)


def _of_one(where: Any, tokens: positions.Tokens, device: torch.device) -> Tensor:
    whole = torch.arange(tokens.shape[0] * tokens.shape[1], device=device).view(tokens.shape)
    if where is None:
        return whole
    if isinstance(where, bool) or not isinstance(where, (int, str)):
        raise ValueError(
            f"positions is {where!r}; it must be a word such as 'l1', an integer, a list of these or a tensor"
        )
    text = where if isinstance(where, str) else f"f{where + 1}" if where >= 0 else f"l{-where}"
    found = positions.rows(parse(text), tokens, True, device)
    if not found:
        raise ValueError(f"positions is {where!r}, of which this forward has none")
    rows = whole if found[0] is None else found[0]
    if isinstance(where, str):
        return rows
    chosen = rows[:, where : where + 1] if where >= 0 else rows[:, :1]
    short = rows.shape[1] < abs(where) + (where >= 0)  # there are fewer tokens than that
    return rows.new_full((tokens.shape[0], 1), -1) if short else chosen
