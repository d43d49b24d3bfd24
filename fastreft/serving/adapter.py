"""An adapter as a pool holds it: its weights packed for every place of a model, and the fingerprint of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from torch import Tensor

from ..ops import activations, pooled
from ..plan.spec import Positions, Tied, parse
from ..settings import ReftSettings
from ..tuner import adapter_file

# Of a configuration, what changes the edit; the rest is how it was trained, or where it came from.
_COUNTS = ("intervention_type", "r", "positions", "tied", "component", "act_fn", "add_bias", "pyreft_compat")


class Adapter(NamedTuple):
    """``A``, ``U`` (places, vectors, d), ``b``, ``c`` (places, vectors): the vectors of all of its interventions, one
    behind the other. ``lines`` (places, interventions, 4): as :class:`fastreft.ops.pooled.Pool` has them, counted from 0."""

    fingerprint: str
    positions: Positions
    tied: Tied
    A: Tensor
    U: Tensor
    b: Tensor
    c: Tensor
    lines: Tensor

    @property
    def vectors(self) -> int:
        """How many vectors it takes."""
        return self.A.shape[1]

    @property
    def interventions(self) -> int:
        """How many lines of a table it takes."""
        return self.lines.shape[1]

    def scaled(self, scale: float) -> Adapter:
        """The same at a strength: 1 = as it was trained, 0 = none of it, below 0 the other way; of its own fingerprint."""
        if scale == 1.0:
            return self
        return self._replace(fingerprint=f"{self.fingerprint}@{scale!r}", U=self.U * scale)

    @property
    def bytes(self) -> int:
        """Of its weights."""
        return sum(t.nbytes for t in (self.A, self.U, self.b, self.c, self.lines))


def read(folder: str | Path, places: Sequence[str] | int, width: int, dtype: torch.dtype = torch.float32) -> Adapter:
    """The adapter in a folder, for a model whose editable modules are ``places`` and whose hidden size is ``width``.

    A number of places is that of a model's blocks, which another engine may have named otherwise: what they give is edited.

    ``ValueError`` in one sentence where there is none, where its file is spoilt or not what its configuration says, and where
    it is for another model.
    """
    path = str(folder)
    try:
        config: Any = PeftConfig.from_pretrained(path)
        if not isinstance(config, ReftSettings):
            raise ValueError("it is not a ReFT adapter")
        found = adapter_file.read(path, config)
    except Exception as error:  # whatever PEFT, JSON and safetensors make of a broken file
        raise ValueError(f"the adapter in '{path}' cannot be read: {' '.join(str(error).split())}") from error
    if found.others:
        raise ValueError(f"the adapter in '{path}' holds {found.others[0]}, which is no edit's, and cannot be served")
    edits = _by_place(path, config, found, places)
    kept: list[pooled.Pool | None] = []
    for tensors_of in edits:
        own = [_weights(path, config, tensors, width) for tensors in tensors_of.values()]
        kept.append(pooled.pool_of(own, dtype) if own else None)
    there = next(pool for pool in kept if pool is not None)
    return Adapter(_fingerprint(config, found), parse(config.positions, pyreft_compat=config.pyreft_compat),
                   config.tied, *_stacked(kept, there))  # fmt: skip


def _by_place(
    path: str, config: Any, found: adapter_file.AdapterFile, places: Sequence[str] | int
) -> list[dict[str, Any]]:
    """The interventions of each place."""
    names: dict[Any, str] = {module: module for module in found.edits}
    if isinstance(places, int):
        if config.component != "block_output" or config.target_modules is not None:
            raise ValueError(
                f"the adapter in '{path}' edits {next(iter(names))}; only what whole blocks give can be served here"
            )
        names = {int(module.rpartition(".")[2]): module for module in found.edits}
    wanted = list(range(places)) if isinstance(places, int) else list(places)
    unknown = next((module for place, module in names.items() if place not in wanted), None)
    if unknown is not None:
        raise ValueError(f"the adapter in '{path}' edits {unknown}, which the model does not have")
    return [found.edits[names[place]] if place in names else {} for place in wanted]


def _weights(path: str, config: Any, tensors: dict[str, Tensor], width: int) -> Any:
    """(U, V, P, b, c) and the activation of one intervention."""
    if any("." in name for name in tensors):
        raise ValueError(
            f"the adapter in '{path}' has an activation with numbers of its own, which the kernels do not know"
        )
    d = adapter_file.width_of(config, tensors)
    if d != width:
        raise ValueError(f"the adapter in '{path}' is for a hidden size of {d}; the model's is {width}")
    with torch.device("meta"):
        edit = adapter_file.made(config, width)
    if not edit.pooled:
        raise ValueError(
            f"the adapter in '{path}' is a {config.intervention_type}, a formula in torch that no kernel knows"
        )
    edit.load_state_dict(tensors, assign=True)
    return tuple(w if w is None else w.detach() for w in edit.weights()), activations.find(config.act_fn)


def _stacked(kept: list[pooled.Pool | None], there: pooled.Pool) -> list[Tensor]:
    """A, U, b, c and the lines of all places; zeros where a place is not edited, or has no b or c."""
    of_vectors = there.A.new_zeros(len(there.A))
    zeros = (
        torch.zeros_like(there.A),
        torch.zeros_like(there.U),
        of_vectors,
        of_vectors,
        torch.zeros_like(there.table),
    )
    rows = []
    for pool in kept:
        own = zeros if pool is None else (pool.A, pool.U, pool.b, pool.c, pool.table)
        rows.append([zero if mine is None else mine for mine, zero in zip(own, zeros, strict=True)])
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _fingerprint(config: Any, found: adapter_file.AdapterFile) -> str:
    """A hash of all that the edits are made of."""
    made = hashlib.sha256(repr([(name, getattr(config, name)) for name in _COUNTS]).encode())
    for module, edits in found.edits.items():
        for which, tensors in edits.items():
            for name in sorted(tensors):
                tensor = tensors[name].contiguous()
                made.update(repr((module, which, name, str(tensor.dtype), tuple(tensor.shape))).encode())
                made.update(bytes(tensor.reshape(-1).view(torch.uint8).numpy()))
    return made.hexdigest()
