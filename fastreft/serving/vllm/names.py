"""Adapters among the models of vLLM's HTTP server: ``"model": NAME`` is the base model with that adapter.

vLLM has a way from a model's name to an adapter, that of its LoRA: ``OpenAIServingModels.lora_requests`` says what names there
are, and what it gives for one goes with the request as its ``lora_request``, and names the model in the answer. Every endpoint,
streaming or not, goes this way. Its public surface (``LoRAResolver``) would have the engine load a LoRA, and a middleware would
have to rewrite the answers, too; so the dictionary gets our names, and :mod:`.front` takes the request out again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from functools import wraps
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from .shelf import Shelf, named, shelf_of

_log = init_logger("vllm.fastreft")


class AdapterName(LoRARequest):  # type: ignore[call-arg]  # msgspec's keywords
    """A request for an adapter of ours, where vLLM has one for a LoRA."""


class Names(dict[str, LoRARequest]):
    """vLLM's LoRAs by name, and behind a name that is none of them ours. To go through it is to go through the LoRAs: vLLM does
    so for those that it applies unasked, by the kinds of a message's contents, and ours are asked for."""

    def __init__(self, loras: dict[str, LoRARequest], shelf: Shelf, base: Collection[str]):
        super().__init__(loras)
        self.shelf, self.base = shelf, base

    def served(self) -> list[str]:
        """The adapters that can be asked for; those that have the name of another model cannot."""
        return [name for name in self.shelf.names() if name not in self.base and not super().__contains__(name)]

    def adapter(self, name: Any) -> str | None:
        """``name`` where it is one of our adapters."""
        ours = name not in self.base and not super().__contains__(name) and name in self.shelf
        return name if ours else None

    def __contains__(self, name: Any) -> bool:
        return super().__contains__(name) or self.adapter(name) is not None

    def __missing__(self, name: str) -> LoRARequest:
        if self.adapter(name) is None:
            raise KeyError(name)
        return AdapterName(lora_name=name, lora_int_id=1, lora_path=str(self.shelf.folder / name))


def hook() -> None:
    """Have the server's models hold our names, list them, and refuse an adapter that is spoilt before an answer begins."""
    if hasattr(OpenAIServingModels.__init__, "_reft"):
        return
    OpenAIServingModels.__init__ = _starting(OpenAIServingModels.__init__)  # type: ignore[method-assign]
    OpenAIServingModels.show_available_models = _listing(OpenAIServingModels.show_available_models)  # type: ignore[method-assign]
    BaseServing._check_model = _checking(BaseServing._check_model)  # type: ignore[method-assign]


def _starting(theirs: Any) -> Any:
    @wraps(theirs)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        base = {path.name for path in self.base_model_paths}
        names = self.lora_requests = Names(self.lora_requests, shelf_of(self.input_processor), base)
        _log.info("fastreft: %d adapters in '%s'", len(names.served()), names.shelf.folder)
        hidden = sorted(base & set(names.shelf.names()))
        if hidden:
            _log.warning(
                "fastreft: the adapter '%s' has the base model's name and can be asked for by vllm_xargs alone",
                hidden[0],
            )

    __init__._reft = True  # type: ignore[attr-defined]
    return __init__


def _listing(theirs: Any) -> Any:
    @wraps(theirs)
    async def show_available_models(self: Any) -> Any:
        listed = await theirs(self)
        names: Names = self.lora_requests
        for name in await asyncio.to_thread(names.served):
            root, parent = str(names.shelf.folder / name), self.base_model_paths[0].name
            listed.data.append(ModelCard(id=name, root=root, parent=parent, permission=[ModelPermission()]))
        return listed

    return show_available_models


def _checking(theirs: Any) -> Any:
    @wraps(theirs)
    async def _check_model(self: Any, request: Any) -> Any:
        refused = await theirs(self, request)
        names = self.models.lora_requests
        if refused is not None or not isinstance(names, Names):
            return refused
        try:
            name = named(getattr(request, "vllm_xargs", None) or {}, names.adapter(request.model))
            if name is not None:
                await asyncio.to_thread(names.shelf.find, name)  # reads and copies a new one, off the event loop
        except ValueError as error:
            return self.create_error_response(str(error))
        return None

    return _check_model
