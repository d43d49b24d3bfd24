"""The embeddings in an adapter's file, which PEFT saves where the vocabulary has grown: its new rows are the adapter's, the
others the base's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def names_of(model: Any) -> list[str]:
    """The names of the embeddings that PEFT may save with an adapter, as where the vocabulary has grown."""
    if not hasattr(model, "get_output_embeddings"):
        return []
    try:
        tables = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # CANINE's: Transformers cannot name them, so a file that holds them is refused
        return []
    return [name for name, module in model.named_modules() if any(module is table for table in tables)]


def vocabulary_of(model: Any) -> int | None:
    """How many words the checkpoint has that a model was loaded from; None where that cannot be read here."""
    config, source = getattr(model, "config", None), getattr(model, "name_or_path", "")
    if config is None or not source:
        return None
    try:
        held: Any = type(config).from_pretrained(source, local_files_only=True)
        return getattr(held.get_text_config(), "vocab_size", None)
    except (OSError, ValueError):
        return None


def with_new_rows(key: str, own: Tensor, given: Tensor, model: nn.Module) -> Tensor:
    """A model's embeddings with the new rows of a file's; the base's own stay, to the bit.

    ``ValueError`` where the file has other values for those. Where the base's vocabulary is not known, they are the rows up to
    the first that differs, if those are half of them or more.
    """
    if own.shape != given.shape or own.is_meta or given.is_meta or not own.is_floating_point():
        return given
    differs = _rows_that_differ(own.detach(), given.detach().to(own.device))
    words = vocabulary_of(model)
    if words is None:
        first = int(differs.int().argmax()) if bool(differs.any()) else len(own)
        words = first if 2 * first >= len(own) else len(own)
    if bool(differs[:words].any()):
        raise ValueError(
            f"loading the adapter: it holds {key}, which is the base model's own and no adapter's, with other values for the "
            "words that the base has; an adapter may add words, and trains the others through modules_to_save"
        )
    return torch.cat([own.detach()[:words], given.detach()[words:].to(own.device, own.dtype)])


def _rows_that_differ(own: Tensor, given: Tensor) -> Tensor:
    """Which rows (n,) are other ones; those that a file rounded to 16 bits, or a base loaded in 16, are the same."""
    same = given.to(own.dtype) == own
    for dtype in (torch.bfloat16, torch.float16):
        same |= own.to(dtype).to(given.dtype) == given
    return ~same.reshape(len(own), -1).all(1)
