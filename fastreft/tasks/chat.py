"""``fastreft chat``: a conversation with a model and its adapter, each turn through the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TextStreamer, set_seed

from .data import prompt_ids, templated
from .errors import UserError
from .flags.chat import ChatArguments
from .generate import check_reft
from .models import adapter_config
from .sets.registry import GENERATE
from .trained import is_adapter, kind_of, load_trained


def _answer(model: Any, tokenizer: Any, ids: list[int], options: dict[str, Any]) -> str:
    """What the model writes, on the screen as it comes."""
    told = torch.tensor([ids], device=model.device)
    shown = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        out = model.generate(
            input_ids=told, attention_mask=torch.ones_like(told), pad_token_id=tokenizer.pad_token_id, streamer=shown,
            **options,
        )  # fmt: skip
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def run(arguments: ChatArguments) -> int:
    """Ask and answer until the input ends."""
    if (kind := kind_of(arguments.adapter)) != GENERATE:
        raise UserError(f"the adapter in '{arguments.adapter}' was trained to {kind}, and not to write")
    config = adapter_config(arguments.adapter) if is_adapter(arguments.adapter) else None
    check_reft(arguments.adapter, config, strength=arguments.strength != 1)
    model, tokenizer, *_ = load_trained(
        arguments.adapter, arguments.model, dtype=arguments.dtype, trust_remote_code=arguments.trust_remote_code
    )
    if model.config.is_encoder_decoder:
        raise UserError("chat is for models that go on with a text, and this one is an encoder-decoder")
    if arguments.strength != 1:
        model.set_scale(arguments.strength)
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.do_sample}
    if arguments.do_sample:
        options |= {"temperature": arguments.temperature, "top_p": arguments.top_p}
    start = [{"role": "system", "content": arguments.system}] if arguments.system else []
    turns = list(start)
    templated(tokenizer, [*turns, {"role": "user", "content": "Hello."}])  # what it refuses it refuses at once
    set_seed(arguments.seed)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return 0
        if not said:
            turns = list(start)
            continue
        turns.append({"role": "user", "content": said})
        ids = prompt_ids(tokenizer, templated(tokenizer, turns), templated=True)
        turns.append({"role": "assistant", "content": _answer(model, tokenizer, ids, options)})
