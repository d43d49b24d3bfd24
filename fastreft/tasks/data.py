"""Training data: JSONL, JSON, CSV or TSV files of prompts and completions -> token ids and labels.

Files are read here and not by ``datasets.load_dataset`` because its errors cannot name a record's line, and because
it refuses files whose unused columns change type; what is read becomes a ``datasets.Dataset``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from .errors import UserError, nearest, user_errors
from .flags.train import DataArguments

IGNORED = -100  # the label that no loss is taken on


def read_records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, record) of every record of a file; 'line 3 of data.jsonl' is where."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the data file '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the data file '{path}' is not UTF-8 text (byte {error.start})") from error
    if file.suffix in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if file.suffix == ".tsv" else ",")
        csv.field_size_limit(max(len(text), csv.field_size_limit()))
        with user_errors(csv.Error, prefix=f"'{path}' is not a table (line {reader.line_num}): "):
            for record in reader:
                yield f"line {reader.line_num} of '{path}'", record
    elif text.lstrip().startswith("["):
        records = _parse_json(text, path, first_line=1)
        for i, record in enumerate(records, 1):
            yield f"record {i} of '{path}'", _as_record(record, f"record {i} of '{path}'")
    else:
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {i} of '{path}'", _as_record(_parse_json(line, path, i), f"line {i} of '{path}'")


def _parse_json(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"bad JSON in line {line} of '{path}': {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists without end
        raise UserError(f"bad JSON in line {first_line} of '{path}': {error}") from error


def _as_record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a record: expected a JSON object with fields")
    return value


def _text_of(record: dict[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise UserError(f"{where} has no field '{name}'{nearest(name, record)}")
    value = record[name]
    if not isinstance(value, str) or not value:
        kind = "is empty" if value in ("", None) else f"is {type(value).__name__}, not text"
        raise UserError(f"the field '{name}' in {where} {kind}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the field '{name}' in {where} holds half a character, {value[error.start]!r}") from error
    return value


def _chat_texts(record: dict[str, Any], name: str, where: str, tokenizer: Any) -> tuple[str, str]:
    """(prompt, completion) of a conversation: the completion is what the last message adds to the template's text."""
    if not tokenizer.chat_template:
        raise UserError(f"messages_field is '{name}' but the model's tokenizer has no chat template")
    if name not in record:
        raise UserError(f"{where} has no field '{name}'{nearest(name, record)}")
    messages = record[name]
    well_formed = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)
    if not well_formed or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"the field '{name}' in {where} is not a list of messages that ends with the assistant's")
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


def load_dataset(path: str, tokenizer: Any, arguments: DataArguments, max_length: int) -> tuple[Dataset, int]:
    """(the encoded records of a file, how many completions were cut at ``max_length`` tokens).

    Every record must have its fields, and a prompt short enough to leave room for a completion.
    """
    encoded, cut = [], 0
    for where, record in read_records(path):
        if arguments.messages_field:
            prompt, completion = _chat_texts(record, arguments.messages_field, where, tokenizer)
        else:
            prompt = _text_of(record, arguments.prompt_field, where)
            completion = _text_of(record, arguments.completion_field, where)
        example = encode(tokenizer, prompt, completion, templated=bool(arguments.messages_field))
        if all(label == IGNORED for label in example["labels"][:max_length]):
            raise UserError(
                f"the prompt in {where} leaves no room for a completion in max_length = {max_length} tokens"
            )
        cut += len(example["input_ids"]) > max_length
        encoded.append({name: values[:max_length] for name, values in example.items()})
    if not encoded:
        raise UserError(f"the data file '{path}' has no records")
    return Dataset.from_list(encoded), cut
