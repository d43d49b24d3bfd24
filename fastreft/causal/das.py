"""Distributed alignment search: a subspace at a place of a frozen model, trained so that exchanging its coordinates has the
effect that exchanging a variable's value has in a causal model.

The loss is cross entropy against the counterfactual label, the metric IIA (interchange intervention accuracy): how often the
model, so changed, answers as the causal model does. Source: Geiger et al. 2023 (arXiv 2303.02536).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..optim import ReftAdamW
from .causal_model import Pairs
from .exchange import Exchange, Kept, call, collect, collect_each
from .sites import Attached, Place, Where, evaluating, find_site
from .subspace import Subspace, load

ANNEALED = {"boundless": (50.0, 0.1), "mask": (1.0, 1e-3)}  # temperature, from and to, by the kind of subspace
PENALTY = {"das": 0.0, "boundless": 1.0, "mask": 1e-4}  # the weight of a mask's part of the loss


@dataclass
class Das:
    """``subspace`` at ``place`` of ``model``, exchanged at positions ``at``; the sources' are ``source_at``, or the same.

    ``choices``: the tokens that are answers, in the labels' order, where the model writes; what counts then is the largest
    logit of these at the last token. Other models give (n, classes) logits. For places and positions see
    :mod:`fastreft.causal.sites`.
    """

    model: nn.Module
    place: Place
    subspace: Subspace
    at: Where = None
    source_at: Where = None
    choices: Sequence[int] | None = None

    def train(
        self,
        pairs: Pairs | Sequence[Pairs],
        *,
        steps: int | None = None,
        epochs: int = 3,
        batch_size: int = 32,
        lr: float = 1e-2,
        mask_lr: float = 1e-2,
        temperature: tuple[float, float] | None = None,
        penalty: float | None = None,
        decay: bool = True,
        seed: int = 0,
        log: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """Train the subspace on pairs of inputs; the losses. The model stays as it is, in eval mode.

        Of several sets of pairs, each with variables of its own, every batch is of one. ``steps`` batches, or ``epochs``
        passes. ``lr`` falls to 0 unless ``decay`` is False; ``mask_lr`` is a boundary's or a mask's. The temperature goes
        from its first value to its second: over all steps for "boundless", over the first half for "mask". ``ValueError``
        where nothing trains.
        """
        sets = self._with_sources(pairs, batch_size)
        trained = [p for p in self.subspace.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("the subspace has nothing to train: its directions are given, and its kind is 'das'")
        R = [p for p in trained if p is self.subspace.R]
        masks = [p for p in trained if p is not self.subspace.R]
        groups = [{"params": R, "lr": lr}, {"params": masks, "lr": mask_lr}]
        optimizer = ReftAdamW([group for group in groups if group["params"]])
        batches = [(i, j) for i, each in enumerate(sets) for j in range(0, len(each.labels), batch_size)]
        total = steps or epochs * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total if decay else 1.0)
        hot, cold = temperature or ANNEALED.get(self.subspace.kind, (1.0, 1.0))
        weight = PENALTY[self.subspace.kind] if penalty is None else penalty
        generator = torch.Generator().manual_seed(seed)
        losses: list[float] = []
        with self._hooked() as logits, torch.enable_grad():
            self.subspace.train()
            for step in range(total):
                if step % len(batches) == 0:
                    order = torch.randperm(len(batches), generator=generator).tolist()
                i, first = batches[order[step % len(batches)]]
                done = step / max(1, total - 1) * (2 if self.subspace.kind == "mask" else 1)
                self.subspace.temperature = hot + (cold - hot) * min(1.0, done)
                batch = _samples(sets[i], slice(first, first + batch_size))
                loss = F.cross_entropy(logits(batch).float(), batch.labels.to(self._device()))
                if weight and self.subspace.kind != "das":
                    loss = loss + weight * self.subspace.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                if log is not None:
                    log(step, losses[-1])
        self.subspace.eval()
        return losses

    @torch.no_grad()
    def predictions(self, pairs: Pairs, *, batch_size: int = 256) -> Tensor:
        """What the model answers with the variables exchanged, (n,) on the CPU: a class, or the place of a choice."""
        (kept,) = self._with_sources(pairs, batch_size)
        found = []
        self.subspace.eval()
        with self._hooked() as logits:
            for first in range(0, len(pairs.labels), batch_size):
                found.append(logits(_samples(kept, slice(first, first + batch_size))).argmax(-1).cpu())
        return torch.cat(found)

    def iia(self, pairs: Pairs | Sequence[Pairs], *, batch_size: int = 256) -> float:
        """The share of the pairs in which the model, its variables exchanged, answers as the causal model does."""
        sets = [pairs] if isinstance(pairs, Pairs) else pairs
        right = [self.predictions(each, batch_size=batch_size) == each.labels.cpu() for each in sets]
        return float(torch.cat(right).float().mean())

    def save(self, path: str | os.PathLike) -> None:
        """The subspace, and where it is, into one file of safetensors. ``ValueError`` for positions that are tensors."""
        about = {"place": self.place, "at": self.at, "source_at": self.source_at, "choices": self.choices}
        for name, value in about.items():
            try:
                json.dumps(value)
            except TypeError:
                raise ValueError(f"{name} is a {type(value).__name__}, which no file can keep") from None
        self.subspace.save(path, about)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module) -> Das:
        """What :meth:`save` wrote, for a model. ``ValueError`` where the file or the model does not fit."""
        subspace, about = load(path)
        if not {"place", "at", "source_at", "choices"} <= set(about):
            raise ValueError(f"'{path}' does not say where its subspace is")
        place = tuple(about["place"]) if isinstance(about["place"], list) else about["place"]
        find_site(model, place)
        device = next((p.device for p in model.parameters()), None)
        return cls(model, place, subspace.to(device), about["at"], about["source_at"], about["choices"])

    # ---- the parts ----------------------------------------------------------------------------------------------------

    def _device(self) -> torch.device:
        return self.subspace.R.device

    def _with_sources(self, pairs: Pairs | Sequence[Pairs], batch_size: int) -> list[Pairs]:
        """The sets with every source run, once, at its positions."""
        sets = [pairs] if isinstance(pairs, Pairs) else list(pairs)
        if not sets or not all(len(each.labels) for each in sets):
            raise ValueError("pairs is empty; there must be an example at least")
        return [each._replace(sources=self._kept(self._named(each), batch_size)) for each in sets]

    def _named(self, pairs: Pairs) -> Pairs:
        """The pairs with their one variable as the subspace has it, which need not name the only one that it holds."""
        if list(self.subspace.variables) != [""] or len(pairs.sources) != 1:
            return pairs
        ((variable, source),) = pairs.sources.items()
        own = pairs.source_at and {"": pairs.source_at[variable]}
        return pairs._replace(sources={"": source}, source_at=own)

    def _kept(self, pairs: Pairs, batch_size: int) -> dict[str, Any]:
        if not set(pairs.sources) <= {*self.subspace.variables, ""}:
            raise ValueError(
                f"pairs have sources for {', '.join(pairs.sources)}; the subspace's variables are "
                f"{', '.join(self.subspace.variables) or 'not named'}"
            )
        found = dict(pairs.sources)
        for variable, source in pairs.sources.items():
            if not isinstance(source, Kept):
                own = (pairs.source_at or {}).get(variable, pairs.at)
                where = own if own is not None else self.at if self.source_at is None else self.source_at
                found[variable] = run_sources(self.model, source, {"": (self.place, where)}, batch_size)[""]
        return found

    @contextmanager
    def _hooked(self) -> Iterator[Callable[[Pairs], Tensor]]:
        """The model in eval mode with no weight that takes a gradient, and a function from pairs to the logits of their
        answers."""
        site = find_site(self.model, self.place)
        asking = [p for p in self.model.parameters() if p.requires_grad]
        attached = Attached(self.model, [site])

        def logits(batch: Pairs) -> Tensor:
            where = self.at if batch.at is None else batch.at
            attached.act = {site: Exchange(where, batch.sources, self.subspace)}
            attached.ran.clear()
            outputs = call(self.model, batch.base)
            if not attached.ran:
                raise ValueError(f"nothing was exchanged at {site.name}: the model's forward did not reach it")
            return answers(outputs, batch.base, self.choices)

        for p in asking:
            p.requires_grad_(False)
        try:
            with evaluating(self.model):
                yield logits
        finally:
            attached.remove()
            for p in asking:
                p.requires_grad_(True)


def answers(outputs: Any, inputs: Any, choices: Sequence[int] | None) -> Tensor:
    """The logits of the answers, (n, classes): of ``choices`` at the last token shown, where there are logits for each
    token."""
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits if hasattr(outputs, "logits") else outputs[0]
    if logits.ndim == 3:
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        last = torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
        if mask is not None and logits.shape[1] == mask.shape[1]:
            last = (mask != 0).long().cumsum(1).argmax(1).to(logits.device)
        logits = logits[torch.arange(len(logits), device=logits.device), last]
    return logits if choices is None else logits[:, list(choices)]


def run_sources(
    model: nn.Module, inputs: Any, wanted: Mapping[Any, tuple[Place, Where]], batch_size: int
) -> dict[Any, Kept]:
    """What :func:`fastreft.causal.collect` keeps, in eval mode and so many samples at a time, by keys of the caller's."""
    with evaluating(model):
        if any(isinstance(where, Tensor) for _, where in wanted.values()):  # which says it a sample
            ((key, (place, where)),) = wanted.items()
            parts = [
                collect(model, _of(inputs, some), {place: where[some]})[place].values  # type: ignore[index]
                for some in _slices(count(inputs), batch_size)
            ]
            return {key: Kept(torch.cat(parts))}
        return collect_each(model, (_of(inputs, some) for some in _slices(count(inputs), batch_size)), wanted)


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, n, size))


def count(inputs: Any) -> int:
    """The samples of a model's inputs."""
    if isinstance(inputs, Mapping):
        inputs = next(iter(inputs.values()))
    return len(inputs[0] if isinstance(inputs, tuple) else inputs)


def _samples(pairs: Pairs, chosen: slice) -> Pairs:
    """Some of the examples. A source of one sample is every example's."""
    sources = {
        variable: kept if len(kept.values) == 1 else Kept(kept.values[chosen])
        for variable, kept in pairs.sources.items()
    }
    at = None if pairs.at is None else pairs.at[chosen]
    return Pairs(_of(pairs.base, chosen), sources, pairs.labels[chosen], at)


def _of(inputs: Any, chosen: slice) -> Any:
    """Some of the samples of a model's inputs."""
    if isinstance(inputs, Mapping):
        return {name: value[chosen] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return tuple(part[chosen] for part in inputs) if isinstance(inputs, tuple) else inputs[chosen]
