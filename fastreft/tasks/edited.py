"""``fastreft inspect --prompt``: which tokens of a text an adapter edits, by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .data import prompt_ids
from .errors import UserError
from .models import reft_config
from .sets.registry import GENERATE
from .trained import load_trained


def marked(tokens: Sequence[str], columns: Sequence[int]) -> str:
    """The text with the edited tokens in brackets."""
    edited = set(columns)
    return "".join(f"[{token}]" if i in edited else token for i, token in enumerate(tokens))


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, the space before a word included."""
    texts = [str(tokenizer.decode(ids[:i], clean_up_tokenization_spaces=False)) for i in range(len(ids) + 1)]
    return [
        now[len(before) :] if now.startswith(before) else str(tokenizer.decode([i]))
        for before, now, i in zip(texts, texts[1:], ids, strict=False)
    ]


def lines(adapter: str, model: str | None, prompts: Sequence[str]) -> Iterator[str]:
    """For each prompt: its length, and the text as it is edited, once for all layers that edit the same tokens of it."""
    reft_config(adapter)
    edited, tokenizer, _, kind, *_ = load_trained(adapter, model)
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt)
        if not ids:
            raise UserError(f"the prompt {prompt!r} has no token")
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        given = {name: tensor.to(edited.device) for name, tensor in given.items()}
        with torch.inference_mode():  # all of it is prompt
            if kind == GENERATE:
                edited.generate(**given, max_new_tokens=1, do_sample=False)
            else:
                edited(**given)
        tokens = pieces(tokenizer, ids)
        yield f"a prompt of {len(ids)} tokens"
        places: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
        for edit in edited.reft_report().edits:
            places.setdefault((edit.adapter, edit.positions, tuple(edit.columns[0])), []).append(edit.layer)
        for (which, positions, columns), layers in places.items():
            where = layers[0] if len(layers) == 1 else f"{len(layers)} modules, {layers[0]} to {layers[-1]}"
            yield f"  {where}: {which} at {positions} edits {len(columns)} tokens"
            yield f"    {marked(tokens, columns)}"
