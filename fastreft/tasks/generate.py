"""``fastreft generate``: text from a trained adapter, beside the untouched model's where asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

import fastreft  # noqa: F401  # registers the method with PEFT

from .arguments import Parser
from .data import prompt_ids
from .errors import UserError, user_errors
from .models import adapter_config, load_adapter, load_base, load_tokenizer


@dataclass
class GenerateArguments:
    """What to write, and how."""

    adapter: str = field(metadata={"help": "the adapter's folder"})
    model: str | None = field(default=None, metadata={"help": "the base model; the one the adapter names if not given"})
    dtype: str = field(default="auto", metadata={"help": "the base model's dtype, or 'auto' for its checkpoint's"})
    prompt: list[str] | None = field(default=None, metadata={"help": "one prompt or more"})
    prompt_file: str | None = field(default=None, metadata={"help": "a text file, one prompt a line; '-' is stdin"})
    chat: bool = field(
        default=False, metadata={"help": "put each prompt through the chat template as a user's message"}
    )
    base: bool = field(default=False, metadata={"help": "write the untouched model's text too"})
    max_new_tokens: int = field(default=128, metadata={"help": "most tokens to write after a prompt"})
    batch_size: int = field(default=8, metadata={"help": "prompts at a time"})
    do_sample: bool = field(default=False, metadata={"help": "sample instead of taking the likeliest token"})
    temperature: float = field(default=1.0, metadata={"help": "with --do_sample: below 1 is more predictable"})
    top_p: float = field(default=1.0, metadata={"help": "with --do_sample: keep the likeliest tokens of this total"})
    seed: int = field(default=0, metadata={"help": "with --do_sample: the random seed"})


def complete(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], batch_size: int = 8, **options: Any
) -> list[str]:
    """What ``model.generate(**options)`` writes after each prompt (token ids), in left-padded batches."""
    texts = []
    for i in range(0, len(prompts), batch_size):
        batch = tokenizer.pad(
            {"input_ids": list(prompts[i : i + batch_size])}, padding_side="left", return_tensors="pt"
        )
        batch = batch.to(model.device)
        with torch.inference_mode():
            out = model.generate(**batch, pad_token_id=tokenizer.pad_token_id, **options)
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def _prompts(arguments: GenerateArguments) -> list[str]:
    prompts = list(arguments.prompt or [])
    if arguments.prompt_file:
        with user_errors(OSError, UnicodeDecodeError, prefix="cannot read the prompt file: "):
            text = sys.stdin.read() if arguments.prompt_file == "-" else Path(arguments.prompt_file).read_text("utf-8")
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts or not all(prompts):
        raise UserError("there is nothing to complete: give --prompt TEXT or --prompt_file FILE, with no empty prompt")
    return prompts


def _encoded(tokenizer: Any, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    if not chat:
        return [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if not tokenizer.chat_template:
        raise UserError("--chat needs a chat template, and the model's tokenizer has none")
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    texts = (tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns)
    return [prompt_ids(tokenizer, text, templated=True) for text in texts]


def _report(prompts: Sequence[str], texts: dict[str, list[str]]) -> Iterator[str]:
    for i, prompt in enumerate(prompts):
        if len(prompts) > 1 or len(texts) > 1:
            yield f"[{i + 1}] {prompt}"
        for name, written in texts.items():
            yield f"{name}: {written[i]}" if len(texts) > 1 else written[i]


def run(argv: Sequence[str]) -> int:
    """Print the completion of every prompt."""
    parser = Parser([GenerateArguments], command="fastreft generate", description="Write text with a trained adapter.")
    (arguments,) = parser.parse(argv)
    prompts = _prompts(arguments)
    named = adapter_config(arguments.adapter).base_model_name_or_path
    if arguments.max_new_tokens < 1 or arguments.batch_size < 1:
        raise UserError("--max_new_tokens and --batch_size must be at least 1")
    if arguments.do_sample and not (arguments.temperature > 0 and 0 < arguments.top_p <= 1):
        raise UserError("--temperature must be above 0, and --top_p above 0 and at most 1")
    name = arguments.model or named
    if not name:
        raise UserError(f"the adapter in '{arguments.adapter}' names no base model; give --model")
    tokenizer = load_tokenizer(name, arguments.adapter)
    encoded = _encoded(tokenizer, prompts, arguments.chat)
    model = load_adapter(load_base(name, arguments.dtype), arguments.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.do_sample}
    if arguments.do_sample:
        options |= {"temperature": arguments.temperature, "top_p": arguments.top_p}
    texts = {}
    for label in ["base", "adapter"] if arguments.base else ["adapter"]:
        set_seed(arguments.seed)
        with model.disable_adapter() if label == "base" else nullcontext():
            texts[label] = complete(model, tokenizer, encoded, arguments.batch_size, **options)
    print("\n".join(_report(prompts, texts)))
    return 0
