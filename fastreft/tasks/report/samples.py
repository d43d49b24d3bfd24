"""The texts that a report looks at, and what a model makes of them with its adapter and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...tuner.loading import layers_of
from ..data import chat_prompt, prompt_ids
from ..errors import UserError
from ..flags.data import DataArguments
from ..flags.train import parser_of
from ..flags.training import training_arguments
from ..generate import complete
from ..records import gather, to_score
from ..sets import Record
from ..sets.entities import OUTSIDE
from ..sets.registry import CLASSIFY, GENERATE, TAG


def of_training(log: dict[str, Any], count: int, data_dir: str | None) -> tuple[list[Record], str]:
    """(the first records that a training was evaluated or scored on, what they are); :class:`UserError` where they are gone."""
    parsed = parser_of(training_arguments()).parse(log.get("settings", ()))
    arguments = next(each for each in parsed if isinstance(each, DataArguments))
    arguments.data_dir = data_dir or arguments.data_dir
    arguments.check()
    data = gather(arguments)
    if data.evaluated:
        return data.evaluated[:count], "Records that the training was evaluated on."
    if data.scored:
        return to_score(data.scored[0], arguments)[:count], f"Test records of {data.scored[0].name}."
    return data.train[:count], "Records that the adapter was trained on."


def token_ids(record: Record, tokenizer: Any, kind: str, chat: bool) -> list[int]:
    """A record as the model is given it."""
    if kind != GENERATE:
        return tokenizer(record.prompt, record.pair).input_ids
    if record.messages is not None:
        text = tokenizer.apply_chat_template(record.messages[:-1], tokenize=False, add_generation_prompt=True)
        return prompt_ids(tokenizer, text, templated=True)
    return prompt_ids(tokenizer, chat_prompt(record.prompt, tokenizer) if chat else record.prompt, templated=chat)


@contextmanager
def without_edits(model: Any) -> Iterator[None]:
    """Within it no layer is edited; a trained head stays, as ``disable_adapter`` would not have it."""
    layers = layers_of(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def written(
    model: Any, tokenizer: Any, texts: Sequence[list[int]], kind: str, labels: Sequence[str], max_new_tokens: int
) -> list[str]:
    """What the model writes after each text, or the label that it gives it, or its tokens."""
    if kind == GENERATE:
        return complete(model, tokenizer, texts, 4, max_new_tokens=max_new_tokens, do_sample=False)
    return [
        (_tags(model, tokenizer, ids, labels) if kind == TAG else _label(model, ids, kind, labels)) for ids in texts
    ]


@torch.inference_mode()
def _label(model: Any, ids: list[int], kind: str, labels: Sequence[str]) -> str:
    logits = model(input_ids=torch.tensor([ids]).to(model.device)).logits[0].float()
    if kind != CLASSIFY:
        return f"{float(logits[0]):.3f}"
    shares = logits.softmax(-1)
    best = int(shares.argmax())
    return f"{labels[best] if best < len(labels) else best} ({float(shares[best]):.0%})"


@torch.inference_mode()
def _tags(model: Any, tokenizer: Any, ids: list[int], labels: Sequence[str]) -> str:
    best = model(input_ids=torch.tensor([ids]).to(model.device)).logits[0].argmax(-1).tolist()
    return _tagged([tokenizer.decode([token]).strip() for token in ids], [labels[i] for i in best])


def _tagged(words: Sequence[str], tags: Sequence[str]) -> str:
    named = (f"{word} ({tag})" for word, tag in zip(words, tags, strict=True) if tag != OUTSIDE)
    return ", ".join(named) or f"all {OUTSIDE}"


def answer_of(record: Record, labels: Sequence[str]) -> str | None:
    """What a record's answer is, in words; None where it has none."""
    if record.messages is not None:
        return str(record.messages[-1].get("content", ""))
    if record.completion:
        return record.completion
    if record.words is not None:
        return _tagged(record.words, record.answer)
    answer = record.answer
    return (
        labels[answer] if isinstance(answer, int) and answer < len(labels) else None if answer is None else str(answer)
    )


def pick(adapter: str, prompts: Sequence[str] | None, log: dict[str, Any], count: int, data_dir: str | None) -> Any:
    """(records, what they are); no records and why, where there are none."""
    if prompts:
        return [Record(prompt) for prompt in prompts], "Texts of --prompt."
    if not log.get("settings"):
        return [], "The adapter's folder does not say what it was trained on; --prompt gives texts to look at."
    try:
        return of_training(log, count, data_dir)
    except UserError as error:
        return [], f"The training's records cannot be read ({error}); --data_dir or --prompt gives texts to look at."
