"""Records out of files: JSONL, JSON, CSV or TSV.

Read here and not by ``datasets.load_dataset`` because its errors cannot name a record's line, and because it refuses files
whose unused columns change type. Imports nothing that takes time, so that a file can be looked at before a model is loaded.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, nearest, user_errors


def lines_of(path: str | Path) -> list[str]:
    """The lines of a text, without their ends."""
    return [line.rstrip("\r") for line in _text_in(path).split("\n")]


def _text_in(path: str | Path) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the data file '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the data file '{path}' is not UTF-8 text (byte {error.start})") from error


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, record) of every record of a file; 'line 3 of data.jsonl' is where."""
    text, file = _text_in(path), Path(path)
    if file.suffix in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if file.suffix == ".tsv" else ",")
        csv.field_size_limit(max(len(text), csv.field_size_limit()))
        with user_errors(csv.Error, prefix=f"'{path}' is not a table (line {reader.line_num}): "):
            for record in reader:
                yield f"line {reader.line_num} of '{path}'", record
    elif text.lstrip().startswith("["):
        records = _parsed(text, path, first_line=1)
        for i, record in enumerate(records, 1):
            yield f"record {i} of '{path}'", _as_record(record, f"record {i} of '{path}'")
    else:
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {i} of '{path}'", _as_record(_parsed(line, path, i), f"line {i} of '{path}'")


def read_table(
    path: str | Path, columns: Sequence[str] = (), broken: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, record) of a table by tabs whose quotes are text, as GLUE's are; ``columns``: of one without a header;
    ``broken``: it is known to have lines of fewer columns, which are left out."""
    lines = lines_of(path)
    first = 1 if columns else 2
    names = list(columns) or lines.pop(0).split("\t")
    for i, line in enumerate(lines, first):
        if not line:
            continue
        values = line.split("\t")
        if broken and len(values) < len(names):
            continue
        if len(values) != len(names):
            raise UserError(
                f"line {i} of '{path}' has {len(values)} columns, and {len(names)} are wanted: {', '.join(names)}"
            )
        yield f"line {i} of '{path}'", dict(zip(names, values, strict=True))


def _parsed(text: str, path: str | Path, first_line: int) -> Any:
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


def text_of(record: dict[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise UserError(f"{where} has no field '{name}' among {', '.join(map(str, record))}{nearest(name, record)}")
    value = record[name]
    if not isinstance(value, str) or not value:
        kind = "is empty" if value in ("", None) else f"is {type(value).__name__}, not text"
        raise UserError(f"the field '{name}' in {where} {kind}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the field '{name}' in {where} holds half a character, {value[error.start]!r}") from error
    return value
