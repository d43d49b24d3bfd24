"""The hooks that edit a base model while a :class:`fastreft.pyreft.ReftModel` runs it, and leave it alone otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..interventions import Intervention
from ..plan.forward import Checkpoint, PerThread
from ..tuner.layer import edit, first, with_first
from .components import Place, block_names
from .locations import Locations


class _Here:
    """What a thread is in: the locations of a call of ours, and whether this forward is a decode step."""

    def __init__(self) -> None:
        self.plan: Locations | None = None  # named as Checkpoint wants it
        self.decoding = False


class Hooks:
    """Every place of the model with its interventions, counted as the representations are."""

    def __init__(self, model: nn.Module, places: Sequence[Place], interventions: Sequence[Intervention]):
        self.local = PerThread(_Here)
        edits: dict[Place, list[tuple[int, Intervention]]] = {}
        for i, (place, intervention) in enumerate(zip(places, interventions, strict=True)):
            edits.setdefault(place, []).append((i, intervention))
        blocks = set(block_names(model))
        for place, here in edits.items():
            module = model.get_submodule(place.name)
            if place.side == "output":
                # A block's output is nobody else's; another module's may be kept for its backward.
                module.register_forward_hook(_After(self.local, here, fresh=place.name in blocks))
            else:
                module.register_forward_pre_hook(_Before(self.local, here, fresh=False), with_kwargs=True)
        generators = [m for m in model.modules() if getattr(m, "can_generate", bool)()]
        for module in {id(m): m for m in (model, *generators)}.values():
            module.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._checkpointers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def run(self, where: Locations, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """``call(**arguments)``, with the model edited at ``where``."""
        outer, self.local.here.plan = self.local.here.plan, where
        try:
            return call(**arguments)
        finally:
            self.local.here.plan, self.local.here.decoding = outer, False

    def _begin(self, module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if self.local.here.plan is None:
            return
        self.local.here.decoding = getattr(kwargs.get("past_key_values"), "get_seq_length", int)() > 0
        if torch.is_grad_enabled() and module.training:
            for inner in self._checkpointers:
                function = inner.__dict__.get("_gradient_checkpointing_func")
                if function is not None and not (isinstance(function, Checkpoint) and function.local is self.local):
                    inner.__dict__["_gradient_checkpointing_func"] = Checkpoint(function, self.local)


class _Edits:
    """The edits at one place, in their order."""

    def __init__(self, local: PerThread, edits: list[tuple[int, Intervention]], fresh: bool):
        self.local, self.edits, self.fresh = local, edits, fresh

    def edited(self, hidden: Tensor) -> Tensor | None:
        """The edited hidden state (B, S, d), in place where it may be; None where nothing is to do."""
        where = self.local.here.plan
        if where is None or where.prompt is self.local.here.decoding:
            return None
        inplace = self.fresh and not torch.compiler.is_compiling()
        for i, intervention in self.edits:
            rows = where.rows(i, (hidden.shape[0], hidden.shape[1]), hidden.device)
            hidden = edit(intervention, hidden, rows, inplace)
        return hidden


class _Before(_Edits):
    """A forward pre-hook: the module's first argument."""

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = None if args else next(iter(kwargs))
        edited = self.edited(args[0] if name is None else kwargs[name])
        if edited is None:
            return None
        return ((edited, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: edited})


class _After(_Edits):
    """A forward hook: the module's output, or its first entry."""

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.edited(output)
        edited = self.edited(first(output))
        return None if edited is None else with_first(output, edited)
