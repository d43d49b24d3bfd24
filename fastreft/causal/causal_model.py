"""A causal model: variables, their parents and the functions that make them. It answers what would be, were a variable's value
another's, and so makes pairs of a base and sources with their counterfactual labels.

Settings hold many examples at once: variable -> numpy array, an entry an example, and functions take and give such arrays.
Source: Geiger et al. 2021 (arXiv 2106.02997); pyvene's CausalModel has the same parts, an example at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Setting = dict[str, Any]


class Pairs(NamedTuple):
    """Counterfactual examples: ``base`` and, by variable, ``sources``, all settings or all inputs of a model, and the
    ``labels`` (n,) that the causal model gives where the base's variables have the sources' values. ``at`` (n, k) and
    ``source_at``, by variable, are positions of their own for each example, where they are not the same for all."""

    base: Any
    sources: dict[str, Any]
    labels: Tensor
    at: Tensor | None = None
    source_at: dict[str, Tensor] | None = None

    def encoded(self, encode: Callable[[Any], Any]) -> Pairs:
        """With every setting as inputs of a model, as ``encode`` makes them."""
        sources = {variable: encode(source) for variable, source in self.sources.items()}
        return self._replace(base=encode(self.base), sources=sources)


class CausalModel:
    """``parents``: variable -> the variables that its function takes, none for an input. ``functions``: of each other variable.
    Inputs are drawn from ``values``, variable -> what it may be, each alike, or all at once by ``sample(n, generator)``.
    ``ValueError`` for a parent that there is not, a loop, a function or values that are missing, and several outputs."""

    def __init__(
        self,
        parents: Mapping[str, Sequence[str]],
        functions: Mapping[str, Callable[..., Any]],
        values: Mapping[str, Sequence[Any]] | None = None,
        sample: Callable[[int, np.random.Generator], Setting] | None = None,
    ):
        self.parents = {name: tuple(of) for name, of in parents.items()}
        self.functions, self.values, self._sample = dict(functions), dict(values or {}), sample
        self.inputs = [name for name, of in self.parents.items() if not of]
        for name, of in self.parents.items():
            missing = [parent for parent in of if parent not in self.parents]
            if missing:
                raise ValueError(f"parents of {name!r} name {missing[0]!r}, which is no variable")
            if of and name not in self.functions:
                raise ValueError(f"functions has none for {name!r}")
            if not of and sample is None and not len(self.values.get(name, ())):
                raise ValueError(f"values has none for the input {name!r}, and there is no sample")
        self.order = self._ordered()
        outputs = [
            name for name, own in self.parents.items() if own and not any(name in of for of in self.parents.values())
        ]
        if len(outputs) != 1:
            raise ValueError(
                f"the variables with parents that are nobody's own are {outputs}; there must be one, the output"
            )
        self.output = outputs[0]

    def _ordered(self) -> list[str]:
        """The variables, parents first."""
        order: list[str] = []
        while len(order) < len(self.parents):
            ready = [name for name, of in self.parents.items() if name not in order and set(of) <= set(order)]
            if not ready:
                raise ValueError(f"parents has a loop among {[name for name in self.parents if name not in order]}")
            order += ready
        return order

    def run(self, inputs: Setting, do: Mapping[str, Any] | None = None) -> Setting:
        """Every variable's value; those in ``do`` are what it says."""
        found: Setting = {}
        for name in self.order:
            if do is not None and name in do:
                found[name] = np.asarray(do[name])
            elif name in self.functions and self.parents[name]:
                found[name] = np.asarray(self.functions[name](*(found[parent] for parent in self.parents[name])))
            else:
                found[name] = np.asarray(inputs[name])
        return found

    def interchange(self, base: Setting, sources: Mapping[str, Setting]) -> Setting:
        """The base's setting where variables have the values that they have in their sources."""
        return self.run(base, {variable: self.run(source)[variable] for variable, source in sources.items()})

    def sample(self, n: int, seed: int | np.random.Generator = 0) -> Setting:
        """n settings of the inputs."""
        generator = np.random.default_rng(seed)
        if self._sample is not None:
            return self._sample(n, generator)
        values = {name: np.asarray(self.values[name]) for name in self.inputs}
        return {name: of[generator.integers(len(of), size=n)] for name, of in values.items()}

    def pairs(self, n: int, variables: str | Iterable[str], seed: int | np.random.Generator = 0) -> Pairs:
        """n pairs in which ``variables`` are exchanged, one or several at once, each with a source of its own. The label is the
        output's value, as an integer. ``ValueError`` for a variable that there is not, or whose output is no number."""
        names = [variables] if isinstance(variables, str) else list(variables)
        for name in names:
            if name not in self.parents:
                raise ValueError(f"variables is {variables!r}; the causal model's are {', '.join(self.parents)}")
        generator = np.random.default_rng(seed)
        base = self.sample(n, generator)
        sources = {name: self.sample(n, generator) for name in names}
        labels = self.interchange(base, sources)[self.output]
        if labels.dtype.kind not in "bui" or labels.shape != (n,):
            raise ValueError(
                f"{self.output!r} is {labels.dtype} {labels.shape}; it must be a boolean or an integer an example"
            )
        return Pairs(base, sources, torch.from_numpy(labels.astype(np.int64)))
