"""Adapters among the models of vLLM's HTTP server: ``"model": NAME`` is the base model with that adapter.

vLLM has a way from a model's name to an adapter, that of its LoRA: ``OpenAIServingModels.lora_requests`` says what names there
are, and what it gives for one goes with the request as its ``lora_request``, and names the model in the answer. Every endpoint,
streaming or not, goes this way. Its public surface (``LoRAResolver``) would have the engine load a LoRA, and a middleware would
have to rewrite the answers, too; so the dictionary gets our names, and :mod:`.front` takes the request out again.
"""

from __future__ import annotations

import asyncio
from functools import wraps
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from .names import Names, named, strength
from .shelf import shelf_of

_log = init_logger("vllm.fastreft")


class AdapterName(LoRARequest):  # type: ignore[call-arg]  # msgspec's keywords
    """A request for an adapter of ours, where vLLM has one for a LoRA."""

    @classmethod
    def of(cls, name: str, folder: str) -> AdapterName:
        """The number is a LoRA's in the engine, which never sees this."""
        return cls(lora_name=name, lora_int_id=1, lora_path=folder)


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
        names = self.lora_requests = Names(self.lora_requests, shelf_of(self.input_processor), base, AdapterName.of)
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
            extra = getattr(request, "vllm_xargs", None) or {}
            name = named(extra, names.adapter(request.model))
            strength(extra, name)
            if name is not None and getattr(request, "use_beam_search", False):
                # Its every step is a request whose prompt is what was written so far, which would be edited as one.
                raise ValueError("use_beam_search is not served with an adapter")
            if name is not None:
                await asyncio.to_thread(names.shelf.find, name)  # reads and copies a new one, off the event loop
        except ValueError as error:
            return self.create_error_response(str(error))
        return None

    return _check_model
