"""What one forward of a model edits: made once from its inputs by a hook on the model, read by every edited block.

Knows torch and the calling conventions of Transformers' models (4.57 and 5), nothing of PEFT.
"""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import positions
from .positions import Positions


class Plan:
    """What one forward edits. Rows are computed when the first block asks and then shared by all."""

    length: int | None = None  # S of the tokens or embeddings given, where there are some

    def __init__(
        self,
        owner: nn.Module,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        explicit: Tensor | None,
        decoding: bool,
        idle: bool,
    ):
        self.owner, self.decoding, self.idle = owner, decoding, idle
        self.attention_mask, self.labels, self.explicit = attention_mask, labels, explicit
        self._found: dict[Any, tuple[Tensor | None, ...]] = {}

    def rows(self, spec: Positions, tied: bool, hidden: Tensor) -> tuple[Tensor | None, ...]:
        """The rows of each intervention, int64 on the device of ``hidden`` (B, S, d); None for every row."""
        key = (spec, tied, hidden.get_device())
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = tuple(self._compute(spec, tied, hidden))
        return found

    def _compute(self, spec: Positions, tied: bool, hidden: Tensor) -> Iterator[Tensor | None]:
        if self.decoding:
            if spec.everywhere:
                yield None
            return
        shape = (hidden.shape[0], hidden.shape[1])
        if self.explicit is not None:
            yield from self._explicit(shape, tied, hidden.device)
            return
        prompt = positions.prompt_mask(shape, self.attention_mask, self.labels) if not spec.everywhere else None
        index = positions.rows(spec, shape, prompt, hidden.device)
        if index is None or tied:
            yield index if index is None else index.reshape(-1)
        else:
            yield index[:, : spec.first].reshape(-1)
            yield index[:, spec.first :].reshape(-1)

    def _explicit(self, shape: tuple[int, int], tied: bool, device: torch.device) -> Iterator[Tensor]:
        given: Tensor = self.explicit  # type: ignore[assignment]
        if not tied and (given.ndim != 3 or given.shape[0] != 2):
            raise ValueError(
                f"reft_positions has shape {tuple(given.shape)}; with tied=False it must be (2, batch, n), "
                "the prefix's positions and the suffix's"
            )
        for index in [given] if tied else given:
            yield positions.explicit_rows(index.to(device), shape).reshape(-1)


class Local(threading.local):
    """The plan of the forward that this thread is in: replicas and servers run several at once."""

    plan: Plan | None = None
    explicit: Tensor | None = None  # positions given to generate(), for its prefill

    def __reduce__(self) -> tuple[type[Local], tuple[()]]:
        return Local, ()  # a copy of the model starts with no forward under way


class Shared:
    """What the blocks of one model have in common: the plan, and the hooks that make it."""

    def __init__(self, model: nn.Module, block_names: list[str]):
        self.local = Local()
        self.everywhere = False  # does any adapter edit decode steps?
        can_generate = getattr(model, "can_generate", None)
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        # Elsewhere labels are not a continuation of the input, so all of it is prompt.
        self.causal = can_generate is not None and bool(can_generate()) and not encoder_decoder
        self.checkpointers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self.warned = False
        self.handles = []
        for module in _entrances(model, block_names):
            self.handles.append(module.register_forward_pre_hook(self.begin, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.end, always_call=True))

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the plan of a forward from its inputs. An inner model called by the outer one leaves it alone."""
        if self.local.plan is not None and self.local.plan.owner is not module:
            return None
        given = kwargs
        if args:
            names = inspect.signature(type(module).forward).parameters
            given = dict(zip(names, (module, *args), strict=False), **kwargs)
        explicit = kwargs.pop("reft_positions", None)
        decoding = _cached_tokens(given) > 0
        attention_mask = given.get("attention_mask")
        if isinstance(attention_mask, dict):  # one a kind of layer; each hides the padding
            attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
        labels = given.get("labels") if self.causal else None
        if labels is not None and explicit is None and not decoding:
            self._warn_without_prompt(attention_mask, labels)
        self.local.plan = Plan(
            module,
            attention_mask,
            labels,
            self.local.explicit if explicit is None else explicit,
            decoding,
            idle=decoding and not self.everywhere,
        )
        tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        self.local.plan.length = None if tokens is None else tokens.shape[1]
        if torch.is_grad_enabled() and module.training:
            self._watch_checkpoints()
        return args, kwargs

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget the plan when the forward that made it is over, or has failed."""
        if self.local.plan is not None and self.local.plan.owner is module:
            self.local.plan = None

    def _warn_without_prompt(self, attention_mask: Tensor | None, labels: Tensor) -> None:
        """Training would do nothing, in silence, where the labels start at the first token. One look, as it waits."""
        if self.warned or self.everywhere or torch.compiler.is_compiling():
            return
        self.warned = True
        prompt = positions.prompt_mask((labels.shape[0], labels.shape[1]), attention_mask, labels)
        if prompt is not None and not bool(prompt.any()):
            warnings.warn(
                "no sample of this batch has a prompt: the labels start at the first token, so nothing is edited; "
                "give prompt tokens the label -100, or use positions='all'",
                stacklevel=2,
            )

    def _watch_checkpoints(self) -> None:
        """Where the model checkpoints activations, have each block recomputed under the plan of its own forward."""
        for module in self.checkpointers:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, Checkpoint):
                module.__dict__["_gradient_checkpointing_func"] = Checkpoint(function, self.local)


class Checkpoint:
    """A checkpoint function that carries the plan over to the recomputation, which comes after the forward's end."""

    def __init__(self, function: Callable[..., Any], local: Local):
        self.function, self.local = function, local

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        plan = self.local.plan

        def run(*args: Any, **kwargs: Any) -> Any:
            outer, self.local.plan = self.local.plan, plan
            try:
                return block(*args, **kwargs)
            finally:
                self.local.plan = outer

        return self.function(run, *args, **kwargs)


def _entrances(model: nn.Module, block_names: list[str]) -> list[nn.Module]:
    """The model, and the models within it on the way to the blocks (``LlamaModel``), which can be called directly."""
    paths = {""}
    for name in block_names:
        above = re.split(r"\.\d+(?:\.|$)", name)[0].split(".")
        paths.update(".".join(above[:i]) for i in range(1, len(above)))
    inner = [model.get_submodule(path) for path in sorted(paths) if path]
    return [model] + [m for m in inner if "input_ids" in inspect.signature(type(m).forward).parameters]


def _cached_tokens(kwargs: dict[str, Any]) -> int:
    """How many tokens the key-value cache handed to a forward already holds; a ``Cache``, or tuples of (key, value)."""
    cache = kwargs.get("past_key_values")
    cache = kwargs.get("cache_params") if cache is None else cache
    if cache is None or (not hasattr(cache, "get_seq_length") and not cache):
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # none of its layers has attention, so none counts
            return int(cache.has_previous_state())
    return 0 if cache[0] is None else cache[0][0].shape[-2]
