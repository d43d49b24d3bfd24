"""Where a request comes in: an adapter's name becomes its content, or the request is refused."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

from .names import named, strength
from .shelf import ARGUMENT, shelf_of


def hook() -> None:
    """Wrap ``InputProcessor.process_inputs``, through which every request comes, whatever asked for it."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from .server import AdapterName

    theirs = InputProcessor.process_inputs
    if hasattr(theirs, "_reft"):
        return
    signature = inspect.signature(theirs)

    @wraps(theirs)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        lora = given.arguments.get("lora_request")
        model = lora.lora_name if isinstance(lora, AdapterName) else None
        extra = getattr(given.arguments["params"], "extra_args", None) or {}
        try:
            name = named(extra, model)
            scale = strength(extra, name)
            found = None if name is None else shelf_of(self).find(name)
        except ValueError as error:  # over HTTP a 400 with its sentence
            raise VLLMValidationError(str(error)) from error
        if model is not None:
            given.arguments["lora_request"] = None
        request = theirs(*given.args, **given.kwargs)
        if found is None:
            return request
        if request.sampling_params is None:
            raise VLLMValidationError("an adapter edits what a model writes; this request asks for no text")
        fingerprint, folder = found
        key = f"{fingerprint}@{scale!r}"
        request.sampling_params.extra_args = {**extra, ARGUMENT: [key, folder, scale]}
        # Blocks of the prefix cache hold edited keys and values: another adapter's, or strength's, are not this one's.
        request.cache_salt = f"{request.cache_salt or ''}reft:{key}"
        return request

    process_inputs._reft = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs  # type: ignore[method-assign]
