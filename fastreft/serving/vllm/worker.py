"""Where a worker runs the model: what each decoder layer gives is edited, row by row, each by its request's adapter.

vLLM's decoder layers give (hidden, residual), whose sum is the hidden state that Transformers' give, or that state itself.
The edit reads the sum and changes ``hidden``. Which rows is worked out once a step, from what the requests have had computed
and what is scheduled now: chunks of prompts, hits of the prefix cache, and what is computed again after a preemption need no
more than that.
"""

from __future__ import annotations

import importlib
import logging
from collections import OrderedDict
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import rows as of_rows
from ..pool import AdapterPool, PoolFull, Resident
from . import environment
from .shelf import ARGUMENT

_log = logging.getLogger("vllm.fastreft")
KNOWN = 10_000  # adapters that a worker's pool knows by name: of those asked for longest ago the folder is read again
_current: Step | None = None  # the step that runs now; a worker runs one at a time


class Asked(NamedTuple):
    """The adapter of a request; ``key``: its name in the pool, that of a content at a strength."""

    key: str
    folder: str
    scale: float


class Step:
    """What a step edits: ``rows`` int64 (n,) of the flat batch, and of each the line of its adapter."""

    def __init__(self, pool: AdapterPool, rows: Tensor, lines: Tensor):
        self.pool, self.rows, self.lines = pool, rows, lines
        self.all = torch.arange(len(rows), device=rows.device)

    def edit(self, place: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Edit the state of a layer in place, in ``hidden``."""
        flat = hidden.view(-1, hidden.shape[-1])
        if residual is None:
            self.pool.edit_(place, flat, self.rows, self.lines)
            return
        before = flat[self.rows] + residual.view(flat.shape)[self.rows]
        after = self.pool.edit_(place, before.clone(), self.all, self.lines)
        flat[self.rows] += after - before


class Served:
    """A worker's pool, and its requests' adapters."""

    def __init__(self, runner: Any):
        config = runner.model_config
        if runner.parallel_config.use_ubatching:
            raise ValueError(
                "ReFT adapters are not served with micro-batches (--enable-dbo): their rows would be miscounted"
            )
        layers = decoder_layers(runner.get_model(), config.get_total_num_hidden_layers())
        self.config, self.device = config, runner.device
        self.pool = self._pool(environment.vectors(), environment.lines())
        # What was asked for, the one asked for last at the end: does it edit prompts alone?
        self._last: OrderedDict[str, bool] = OrderedDict()
        for place, layer in layers:
            layer.register_forward_hook(_hook_of(place))

    def step(self, runner: Any) -> Step | None:
        """What the step that the runner has prepared edits; None for nothing."""
        batch, starts = runner.input_batch, runner.query_start_loc.np
        computed = batch.num_computed_tokens_cpu[: len(batch.req_ids)].tolist()
        asked: list[tuple[int, Any, Asked]] = []
        for i, name in enumerate(batch.req_ids):
            request = runner.requests[name]
            extra = getattr(request.sampling_params, "extra_args", None) or {}
            if ARGUMENT in extra:
                each = Asked(*extra[ARGUMENT])
                written = computed[i] >= request.num_prompt_tokens
                if not (written and self._last.get(each.key, False)):
                    asked.append((i, request, each))
        if not asked:
            return None
        where = self._where({each.key: each for _, _, each in asked})
        rows: list[int] = []
        lines: list[int] = []
        for i, request, each in asked:
            there = where[each.key]
            adapter, begin = there.adapter, computed[i]
            count = int(starts[i + 1] - starts[i])
            found = of_rows.of_step(adapter.positions, adapter.tied, request.num_prompt_tokens, begin, begin + count)
            rows += [int(starts[i]) + token - begin for token, _ in found]
            lines += [there.line + share for _, share in found]
        if not rows:
            return None
        on = self.pool.A.device
        return Step(self.pool, torch.tensor(rows, device=on), torch.tensor(lines, device=on))

    def _pool(self, vectors: int, lines: int) -> AdapterPool:
        exact = self.config.dtype is torch.float32
        return AdapterPool(
            self.config.get_total_num_hidden_layers(),
            self.config.get_hidden_size(),
            vectors=vectors,
            lines=lines,
            most_r=environment.most_r(),
            dtype=torch.float32 if exact else torch.bfloat16,
            device=self.device,
        )

    def _where(self, asked: dict[str, Asked]) -> dict[str, Resident]:
        """Where the adapters of a step lie; in a larger pool if they do not fit together, as an error would end the engine."""
        self._forget(asked)
        while True:
            try:
                for key, each in asked.items():
                    if key not in self.pool:
                        self.pool.add(key, each.folder, each.scale)
                where = self.pool.take(asked)
            except PoolFull:
                vectors, lines = 2 * self.pool.A.shape[1], 2 * self.pool.table.shape[1]
                _log.warning("fastreft: a step has more adapters than the pool; FASTREFT_VECTORS is %d now", vectors)
                self.pool = self._pool(vectors, lines)
            else:
                for key, there in where.items():
                    positions = there.adapter.positions
                    self._last[key] = not (positions.everywhere or positions.written)
                return where

    def _forget(self, asked: dict[str, Asked]) -> None:
        """Have the pool know those that were asked for last, and not all there ever were."""
        for key in asked:
            self._last.setdefault(key, False)
            self._last.move_to_end(key)
        while len(self._last) > max(KNOWN, len(asked)):
            gone, _ = self._last.popitem(last=False)
            if gone in self.pool:
                self.pool.remove(gone)


def decoder_layers(model: nn.Module, count: int) -> list[tuple[int, nn.Module]]:
    """(number, layer) of those of the decoder's ``count`` layers that this worker has; ``ValueError`` where none are found."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    for module in lists:
        found = [(i, layer) for i, layer in enumerate(module) if any(True for _ in layer.parameters())]
        if found:  # those of another stage of a pipeline are there without weights
            return found
    raise ValueError(
        f"{type(model).__name__} has no list of {count} layers, so that it cannot be served with ReFT adapters"
    )


@torch.library.custom_op("fastreft_serving::edit", mutates_args=("hidden",))
def _edit(hidden: Tensor, residual: Tensor | None, place: int) -> None:
    """The edit as an op, which a compiler leaves in its place: what it edits is asked when it runs, not when it is traced."""
    if _current is not None:
        _current.edit(place, hidden, residual)


@_edit.register_fake
def _(hidden: Tensor, residual: Tensor | None, place: int) -> None:
    pass


def _hook_of(place: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not is_compiling() and _current is None:
            return
        if isinstance(output, tuple):
            hidden, residual = output[0], output[1] if len(output) > 1 and isinstance(output[1], Tensor) else None
        else:
            hidden, residual = output, None
        _edit(hidden, residual, place)

    return hook


def hook() -> None:
    """Wrap the model runner's loading of the model, and its call of it; and have compiled models know of the edits."""
    from vllm.config import VllmConfig
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    newer = importlib.import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner
    newer.load_model = _refused
    for runner in (GPUModelRunner, CPUModelRunner):
        theirs = runner.__dict__.get("load_model")
        if theirs is not None and not hasattr(theirs, "_reft"):
            runner.load_model = _loading(theirs)
    if not hasattr(VllmConfig.compute_hash, "_reft"):
        VllmConfig.compute_hash = _hashing(VllmConfig.compute_hash)  # type: ignore[method-assign]
    if not hasattr(GPUModelRunner._model_forward, "_reft"):
        GPUModelRunner._model_forward = _running(GPUModelRunner._model_forward)


def _refused(self: Any, *args: Any, **kwargs: Any) -> None:
    """In place of silence: that runner has no such steps."""
    raise ValueError("ReFT adapters are not served by vLLM's newer model runner; set VLLM_USE_V2_MODEL_RUNNER=0")


def _loading(theirs: Any) -> Any:
    @wraps(theirs)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = theirs(self, *args, **kwargs)
        self._reft = Served(self)
        return found

    load_model._reft = True  # type: ignore[attr-defined]
    return load_model


def _running(theirs: Any) -> Any:
    @wraps(theirs)
    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _current
        served = self.__dict__.get("_reft")
        _current = None if served is None or not self.input_batch.req_ids else served.step(self)
        try:
            return theirs(self, *args, **kwargs)
        finally:
            _current = None

    _model_forward._reft = True  # type: ignore[attr-defined]
    return _model_forward


def _hashing(theirs: Any) -> Any:
    @wraps(theirs)
    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> str:
        return f"{theirs(self, *args, **kwargs)}-reft"

    compute_hash._reft = True  # type: ignore[attr-defined]
    return compute_hash
