"""``fastreft generate``: text from a trained adapter, beside the untouched model's where asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..ops.groups import choice_of, rows_of
from ..settings import ReftSettings
from . import processes
from .data import chat_prompt, prompt_ids
from .errors import UserError, user_errors
from .flags.generate import NO_PROMPT, GenerateArguments
from .models import adapter_config, context_of
from .read import read_records, text_of
from .run_log import write_rows
from .sets.registry import GENERATE
from .trained import is_adapter, kind_of, load_trained


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    batch_size: int = 8,
    subspaces: Sequence[Any] | None = None,
    *,
    max_new_tokens: int,
    **options: Any,
) -> list[str]:
    """What ``model.generate(**options)`` writes after each prompt (token ids), in left-padded batches, with the
    ``subspaces`` of each where they are given. Prompts keep their ends and less is written where a model's context is too
    short for both, of which a line on stderr tells."""
    texts = []
    prompts, max_new_tokens = _within_context(model, prompts, max_new_tokens)
    for i in range(0, len(prompts), batch_size):
        batch = tokenizer.pad(
            {"input_ids": list(prompts[i : i + batch_size])}, padding_side="left", return_tensors="pt"
        )
        batch = batch.to(model.device)
        if subspaces is not None:
            batch["subspaces"] = list(subspaces[i : i + batch_size])
        with torch.inference_mode():
            out = model.generate(**batch, pad_token_id=tokenizer.pad_token_id, max_new_tokens=max_new_tokens, **options)
        start = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        texts += tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
    return texts


def _within_context(model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> tuple[Sequence[list[int]], int]:
    """(prompts, tokens to write) that a model's context has room for: half of it is the prompts' at least."""
    context = context_of(model.config)
    if context is None or model.config.is_encoder_decoder:
        return prompts, max_new_tokens
    room = context - min(max_new_tokens, context // 2)
    cut = sum(len(ids) > room for ids in prompts)
    prompts = [ids[-room:] for ids in prompts]
    fewer = min(max_new_tokens, context - max(map(len, prompts)))
    said = [f"{cut} prompts were cut to their last {room} tokens"] * (cut > 0)
    said += [f"{fewer} tokens are written at most"] * (fewer < max_new_tokens)
    if said and processes.is_first():
        print(f"note: {', and '.join(said)}: the model's context is {context}", file=sys.stderr)
    return prompts, fewer


def _prompts(arguments: GenerateArguments) -> list[str]:
    prompts = list(arguments.prompt or [])
    if arguments.prompt_file and Path(arguments.prompt_file).suffix in (".jsonl", ".json", ".csv", ".tsv"):
        rows = read_records(arguments.prompt_file)
        prompts += [text_of(record, arguments.prompt_field, where) for where, record in rows]
    elif arguments.prompt_file:
        with user_errors(OSError, UnicodeDecodeError, prefix="cannot read the prompt file: "):
            text = sys.stdin.read() if arguments.prompt_file == "-" else Path(arguments.prompt_file).read_text("utf-8")
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts or not all(prompts):
        raise UserError(NO_PROMPT)
    return prompts


def _encoded(tokenizer: Any, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    if not chat:
        return [prompt_ids(tokenizer, prompt) for prompt in prompts]
    return [prompt_ids(tokenizer, chat_prompt(prompt, tokenizer), templated=True) for prompt in prompts]


def _report(prompts: Sequence[str], texts: dict[str, list[str]]) -> Iterator[str]:
    for i, prompt in enumerate(prompts):
        if len(prompts) > 1 or len(texts) > 1:
            yield f"[{i + 1}] {prompt}"
        for name, written in texts.items():
            yield f"{name}: {written[i]}" if len(texts) > 1 else written[i]


def check_reft(folder: str, config: Any, **asked: bool) -> None:
    """:class:`UserError` where something is asked for that ReFT adapters alone have."""
    for flag, given in asked.items():
        if given and not isinstance(config, ReftSettings):
            what = "a whole model" if config is None else config.peft_type
            raise UserError(f"{flag} is of a ReFT adapter's edits, and the one in '{folder}' is {what}")


def run(arguments: GenerateArguments) -> int:
    """Print the completion of every prompt."""
    prompts = _prompts(arguments)
    config = adapter_config(arguments.adapter) if is_adapter(arguments.adapter) else None
    check_reft(arguments.adapter, config, strength=arguments.strength != 1, subspaces=arguments.subspaces is not None)
    if arguments.base and config is None:
        raise UserError(f"all of the model in '{arguments.adapter}' was trained: --base is of an adapter's")
    if arguments.subspaces is not None and isinstance(config, ReftSettings):
        with user_errors(ValueError):
            rows_of(choice_of(arguments.subspaces), config.groups(), config.r, "the adapter")
    if (kind := kind_of(arguments.adapter)) != GENERATE:
        raise UserError(f"the adapter in '{arguments.adapter}' was trained to {kind}; 'fastreft eval' has it do so")
    model, tokenizer, *_, trained = load_trained(
        arguments.adapter, arguments.model, dtype=arguments.dtype, trust_remote_code=arguments.trust_remote_code
    )
    encoded = _encoded(tokenizer, prompts, arguments.chat or bool(trained.get("chat")))  # as it was trained
    if arguments.strength != 1:
        model.set_scale(arguments.strength)
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.do_sample}
    if arguments.subspaces is not None:
        options["subspaces"] = [arguments.subspaces] * len(prompts)
    if arguments.do_sample:
        options |= {"temperature": arguments.temperature, "top_p": arguments.top_p}
    texts = {}
    for label in ["base", "adapter"] if arguments.base else ["adapter"]:
        set_seed(arguments.seed)
        with model.disable_adapter() if label == "base" else nullcontext():
            texts[label] = complete(model, tokenizer, encoded, arguments.batch_size, **options)
    if arguments.output is not None:
        rows = ({"prompt": prompt, **{name: texts[name][i] for name in texts}} for i, prompt in enumerate(prompts))
        write_rows(arguments.output, list(rows))
    else:
        print("\n".join(_report(prompts, texts)))
    return 0
