"""What a model makes of a task's records, and what that is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

from .data import IGNORED, Pad, chat_prompt, chat_texts, encode_written, numbers_for, prompt_ids
from .generate import complete
from .records import label_index
from .sets import Record, TaskSet
from .sets.metrics import METRICS, accuracy
from .sets.registry import GENERATE, REGRESS, TAG
from .tags import predict_tags


@dataclass
class Score:
    """A task's metrics in percent, and a loss per token, of ``records`` records. ``unparsed``: those in whose text no answer
    was found, which count as wrong. ``predictions``: one of them each, as written to a file."""

    task: str
    metrics: dict[str, float]
    records: int
    unparsed: int = 0
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def in_words(self) -> str:
        """One line."""
        digits = {"loss": 4}
        shown = (f"{name} {value:.{digits.get(name, 2)}f}" for name, value in self.metrics.items())
        values = "   ".join(shown) or "written, not scored"
        return f"{self.task}: {values}   ({self.records:,} records" + (
            f", {self.unparsed:,} without an answer)" if self.unparsed else ")"
        )


def score(
    task: TaskSet,
    records: Sequence[Record],
    model: Any,
    tokenizer: Any,
    *,
    labels: tuple[str, ...] = (),
    chat: bool = False,
    batch_size: int = 8,
    max_length: int = 512,
) -> Score:
    """A model's score on records: greedily written answers, the likeliest label, or that of each word."""
    if task.kind == GENERATE:
        written = write(records, model, tokenizer, chat=chat, batch_size=batch_size, max_new_tokens=task.max_new_tokens)
        return _score_written(task, records, written)
    if task.kind == TAG:
        tags = predict_tags(records, model, tokenizer, labels, batch_size=batch_size, max_length=max_length)
        return _scored(task, records, tags, [list(record.answer) for record in records], tags)
    values = predict(records, model, tokenizer, batch_size=batch_size, max_length=max_length)
    if task.kind == REGRESS:
        return _scored(task, records, values, [float(record.answer) for record in records], values)
    found = [max(range(len(row)), key=row.__getitem__) for row in values]
    wanted = [label_index(record, labels) for record in records]
    return _scored(task, records, found, wanted, [labels[i] if i < len(labels) else str(i) for i in found], labels)


def write(
    records: Sequence[Record], model: Any, tokenizer: Any, *, chat: bool, batch_size: int, max_new_tokens: int
) -> list[str]:
    """What a model writes after each record's prompt, greedily."""
    if model.config.is_encoder_decoder:
        prompts = [tokenizer(record.prompt).input_ids for record in records]
    else:
        prompts = [_asked(record, tokenizer, chat) for record in records]
    chosen = [record.subspaces for record in records]
    asked = chosen if any(chosen) and numbers_for(model) is not None else None
    return complete(
        model, tokenizer, prompts, batch_size, subspaces=asked, max_new_tokens=max_new_tokens, do_sample=False
    )


def _asked(record: Record, tokenizer: Any, chat: bool) -> list[int]:
    """A prompt's tokens, through the chat template where the record is a conversation or is to be one."""
    if record.messages is not None:
        return prompt_ids(tokenizer, chat_texts(record.messages, record.where, tokenizer)[0], templated=True)
    if chat:
        return prompt_ids(tokenizer, chat_prompt(record.prompt, tokenizer), templated=True)
    return prompt_ids(tokenizer, record.prompt)


@torch.inference_mode()
def completion_loss(
    records: Sequence[Record],
    model: Any,
    tokenizer: Any,
    *,
    chat: bool,
    batch_size: int,
    max_length: int,
    too_long: str = "error",
) -> tuple[float, int, int]:
    """(the mean loss of the completions' tokens, their ends included, as in a training; how many records were cut at
    ``max_length``, and how many left out). :class:`UserError` for a prompt that leaves no room, by ``too_long``."""
    apart = bool(model.config.is_encoder_decoder)
    numbers = numbers_for(model)
    how: dict[str, Any] = {"max_length": max_length, "too_long": too_long, "chat": chat, "apart": apart}
    encoded = encode_written(records, tokenizer, numbers=numbers, **how)
    pad, total, tokens = Pad(DataCollatorForSeq2Seq(tokenizer)), 0.0, 0
    for i in range(0, len(encoded.data), batch_size):
        batch = pad([encoded.data[j] for j in range(i, min(i + batch_size, len(encoded.data)))]).to(model.device)
        counted = batch["labels"] if apart else batch["labels"][:, 1:]  # a causal model is not asked for the first
        n = int((counted != IGNORED).sum())
        total, tokens = total + n * float(model(**batch).loss), tokens + n
    return total / tokens, encoded.cut, encoded.dropped


@torch.inference_mode()
def predict(records: Sequence[Record], model: Any, tokenizer: Any, *, batch_size: int, max_length: int) -> list[Any]:
    """A row of scores for each record, or its number where the model has one output."""
    found: list[Any] = []
    for i in range(0, len(records), batch_size):
        some = records[i : i + batch_size]
        pairs = [record.pair for record in some]
        batch = tokenizer(
            [record.prompt for record in some],
            None if pairs[0] is None else pairs,
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        logits = model(**batch).logits.float().cpu()
        found += logits[:, 0].tolist() if logits.shape[1] == 1 else logits.tolist()
    return found


def _score_written(task: TaskSet, records: Sequence[Record], written: Sequence[str]) -> Score:
    found = [task.answer_of(text) for text in written]
    right = [a is not None and task.same(a, record.answer) for a, record in zip(found, records, strict=True)]
    wanted = [record.answer for record in records]
    rows = []
    for record, text, answer, good in zip(records, written, found, right, strict=True):
        row: dict[str, Any] = {**record.about, "output": text}
        if task.metrics:
            row |= {"found": answer, "answer": record.answer, "right": good}
        rows.append(row)
    if not task.metrics:
        return Score(task.name, {}, len(records), 0, rows)
    # Of answers that are right or wrong, those that are; else the answers themselves.
    values = {
        name: accuracy(right, [True] * len(right)) if name == "accuracy" else METRICS[name](found, wanted)
        for name in task.metrics
    }
    return Score(task.name, values, len(records), sum(a is None for a in found), rows)


def _scored(
    task: TaskSet,
    records: Sequence[Record],
    found: Sequence[Any],
    wanted: Sequence[Any],
    shown: Sequence[Any],
    labels: tuple[str, ...] = (),
) -> Score:
    rows = []
    for record, a, b, said in zip(records, found, wanted, shown, strict=True):
        row: dict[str, Any] = {"text": record.prompt} if record.words is None else {"words": record.words}
        if record.pair is not None:
            row["pair"] = record.pair
        named = isinstance(record.answer, int) and record.answer < len(labels)
        row |= {"found": said, "answer": labels[record.answer] if named else record.answer}
        if task.kind != REGRESS:
            row["right"] = a == b
        rows.append(row)
    return Score(task.name, {name: METRICS[name](found, wanted) for name in task.metrics}, len(records), 0, rows)


def metrics_for_trainer(
    kind: str, names: Sequence[str], labels: tuple[str, ...]
) -> Callable[[Any], dict[str, float]] | None:
    """``compute_metrics`` of Trainer; None for text, of which it has the loss alone."""
    if kind == GENERATE:
        return None

    def compute(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        found = logits.reshape(-1) if kind == REGRESS else logits.argmax(-1)
        wanted = prediction.label_ids
        if kind == TAG:
            found, wanted = _tags(found, wanted, labels), _tags(wanted, wanted, labels)
        return {name: METRICS[name](found, wanted) for name in names}

    return compute


def _tags(numbers: Any, wanted: Any, labels: tuple[str, ...]) -> list[list[str]]:
    """The tags of each sentence's words, of the labels' numbers at every token."""
    return [
        [labels[a] for a, b in zip(row, own, strict=True) if b != IGNORED]
        for row, own in zip(numbers.tolist(), wanted.tolist(), strict=True)
    ]


def mean_and_spread(values: Sequence[float]) -> str:
    """ "81.2 ± 0.4" of several runs, the spread being the standard deviation over them."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    spread = stdev(values)
    return f"{fmean(values):.2f} ± {spread:.2f}" if math.isfinite(spread) else "nan"
