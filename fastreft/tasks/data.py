"""Records -> token ids and labels, as a ``datasets.Dataset``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..ops.groups import choice_of
from ..ops.groups import numbers_of as numbers_of_choice
from ..ops.subspaces import padded
from ..settings import ReftSettings
from .errors import UserError, user_errors
from .records import label_index
from .sets import Record
from .sets.registry import CLASSIFY, TAG
from .tags import check_fast, first_pieces

IGNORED = -100  # the label that no loss is taken on


def chat_texts(messages: list[dict[str, Any]], where: str, tokenizer: Any) -> tuple[str, str]:
    """(prompt, completion) of a conversation: the completion is what the last message adds to the template's text."""
    if not tokenizer.chat_template:
        raise UserError("a conversation needs a chat template, and the model's tokenizer has none")
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template raises whatever its author chose
        raise UserError(f"the chat template refuses the messages in {where}: {error}") from error
    if not whole.startswith(prompt):
        raise UserError(
            f"the chat template rewrites the prompt in {where} once the reply is there; use prompt and completion"
        )
    return prompt, whole[len(prompt) :]


def chat_prompt(text: str, tokenizer: Any) -> str:
    """A user's message as the chat template puts it, with the beginning of the answer."""
    return templated(tokenizer, [{"role": "user", "content": text}])


def templated(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """Messages, the last a user's, as the chat template puts them, with the beginning of the answer."""
    if not tokenizer.chat_template:
        raise UserError("a chat needs a chat template, and the model's tokenizer has none")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template raises whatever its author chose
        raise UserError(f"the chat template refuses a user's message: {' '.join(str(error).split())}") from error


def prompt_ids(tokenizer: Any, prompt: str, *, templated: bool = False) -> list[int]:
    """The prompt's tokens as generation will see them: special tokens at the start, none at the end.

    ``templated``: the text is a chat template's, which wrote the special tokens itself.
    """
    ids = tokenizer(prompt, add_special_tokens=not templated).input_ids
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not templated else ids


def encode(tokenizer: Any, prompt: str, completion: str, *, templated: bool = False) -> dict[str, list[int]]:
    """Token ids of prompt + completion + end of sequence, and labels that leave the prompt out.

    The two are tokenised apart, so that the prompt has the tokens that it will have at generation.
    """
    start = prompt_ids(tokenizer, prompt, templated=templated)
    rest = tokenizer(completion, add_special_tokens=False).input_ids
    if not templated:  # a template writes its own end of turn
        rest = [*rest, tokenizer.eos_token_id]
    return {"input_ids": start + rest, "labels": [IGNORED] * len(start) + rest}


Numbers = Callable[[Any], list[int]]  # of a record's subspaces; ValueError for what the adapter has not


def numbers_of(settings: ReftSettings) -> Numbers:
    """What numbers an adapter has for a record's subspaces."""
    groups = settings.groups()
    return lambda given: numbers_of_choice(choice_of(given), groups, settings.r, "the adapter")


def numbers_for(model: Any) -> Numbers | None:
    """The same of the adapter that a model has; None where that is none of ReFT's."""
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    return numbers_of(config) if isinstance(config, ReftSettings) else None


def _subspaces(records: Sequence[Record], numbers: Numbers | None) -> list[list[int]] | None:
    """Those of each record; None where no record has any, or nobody asks. :class:`UserError` where some have none."""
    if numbers is None or all(record.subspaces is None for record in records):
        return None
    found = []
    for i, record in enumerate(records, 1):
        where = record.where or f"record {i}"
        if record.subspaces is None:
            raise UserError(f"{where} has no subspaces, and others have: name those that it is for")
        with user_errors(ValueError, prefix=f"{where}: "):
            found.append(numbers(choice_of(record.subspaces)))
    return found


class Pad:
    """A collator that pads, and takes ``subspaces`` along, (B, n), -1 where a record has fewer than another."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __call__(self, records: Sequence[dict[str, Any]]) -> Any:
        chosen = [record["subspaces"] for record in records if "subspaces" in record]
        batch = self.inner([{name: value for name, value in each.items() if name != "subspaces"} for each in records])
        if chosen:
            batch["subspaces"] = padded(chosen)
        return batch


@dataclass
class Encoded:
    """Records as tokens, and how many were cut or left out for their length."""

    data: Dataset
    cut: int = 0
    dropped: int = 0


def encode_written(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    too_long: str = "error",
    chat: bool = False,
    apart: bool = False,
    numbers: Numbers | None = None,
    completion_tokens: int | None = None,
) -> Encoded:
    """What a model learns to write; see :class:`fastreft.tasks.flags.data.DataArguments` for ``too_long``.

    ``apart``: for an encoder-decoder, whose prompt is the input and whose completion the labels, each up to ``max_length``.
    ``numbers``: of the subspaces of a record, which are left out where it is None. ``completion_tokens``: of each completion
    the first so many, and no end.
    """
    rows: list[dict[str, Any]] = []
    cut, dropped, chosen = 0, 0, _subspaces(records, numbers)
    for i, record in enumerate(records, 1):
        where = record.where or f"record {i}"
        templated = chat or record.messages is not None
        prompt, completion = record.prompt, record.completion
        if templated:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            prompt, completion = chat_texts(record.messages or turns, where, tokenizer)
        if apart:
            ids = {
                "input_ids": tokenizer(prompt).input_ids,
                "labels": tokenizer(text_target=completion).input_ids,
            }
        else:
            ids = encode(tokenizer, prompt, completion, templated=templated)
        if completion_tokens is not None:
            answer = sum(label != IGNORED for label in ids["labels"])
            kept = len(ids["labels"]) - max(0, answer - completion_tokens)
            ids = {name: values if apart and name != "labels" else values[:kept] for name, values in ids.items()}
        length = max(map(len, ids.values()))
        if length > max_length:
            if too_long == "drop":
                dropped += 1
                continue
            cut += 1
            no_room = not apart and all(label == IGNORED for label in ids["labels"][:max_length])
            if no_room and too_long == "error":
                raise UserError(
                    f"the prompt in {where} leaves no room for a completion in max_length = {max_length} tokens; "
                    "--too_long drop leaves such records out, --too_long cut cuts the prompt"
                )
            if no_room:  # half of the room for the completion at most
                room = min(sum(label != IGNORED for label in ids["labels"]), max(1, max_length // 2))
                start = sum(label == IGNORED for label in ids["labels"]) + room - max_length
                ids = {name: values[start:] for name, values in ids.items()}
        more = {} if chosen is None else {"subspaces": chosen[i - 1]}
        rows.append({name: values[:max_length] for name, values in ids.items()} | more)
    if not rows:
        raise UserError(f"all {dropped} records are longer than max_length = {max_length} tokens")
    return Encoded(Dataset.from_list(rows), cut, dropped)


def encode_labelled(
    records: Sequence[Record], tokenizer: Any, kind: str, labels: tuple[str, ...], *, max_length: int, too_long: str
) -> Encoded:
    """Texts and pairs with the numbers of their labels, those of words at the first piece of each, or with their scores; longer
    ones are cut at their end."""
    if kind == TAG:
        check_fast(tokenizer)
    rows, cut, dropped = [], 0, 0
    for record in records:
        ids = tokenizer(record.prompt, record.pair).input_ids
        if len(ids) > max_length:
            if too_long == "drop":
                dropped += 1
                continue
            cut += 1
        encoded = tokenizer(record.prompt, record.pair, truncation=True, max_length=max_length)
        rows.append({**encoded, "labels": _label_of(record, kind, labels, encoded)})
    if not rows:
        raise UserError(f"all {dropped} records are longer than max_length = {max_length} tokens")
    return Encoded(Dataset.from_list(rows), cut, dropped)


def _label_of(record: Record, kind: str, labels: tuple[str, ...], encoded: Any) -> int | float | list[int]:
    if kind == CLASSIFY:
        return label_index(record, labels)
    if kind != TAG:
        return float(record.answer)
    found = [IGNORED] * len(encoded.input_ids)
    for piece, tag in zip(first_pieces(encoded, 0, record), record.answer, strict=True):
        if piece is not None:
            found[piece] = labels.index(tag)
    return found
