"""Texts with labels: 77 intents of a bank's customers, 150 intents of CLINC's, or files of your own.

BANKING77 (Casanueva et al. 2020); CLINC150 (Larson et al. 2019), whose out-of-scope texts are one label more.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError
from ..read import read_records, text_of
from .places import file_of, from_hub
from .registry import CLASSIFY, Record, register
from .tagging import from_columns, from_lists, of_columns


def from_file(path: Path | str, text: str, label: str, pair: str | None = None) -> Iterator[Record]:
    """The records of a file whose fields are named; of words where the label is a list of tags, or the fields are columns."""
    if of_columns(path, text, label):
        yield from from_columns(path, text, label)
        return
    for where, row in read_records(path):
        value = row.get(label)
        if isinstance(value, list):
            yield from_lists(row, text, label, where)
            continue
        if isinstance(value, (bool, int)):  # numbered classes are labels, too
            row = {**row, label: str(value)}
        yield Record(
            text_of(row, text, where),
            answer=text_of(row, label, where),
            pair=text_of(row, pair, where) if pair else None,
            where=where,
        )


def mixed(records: Iterable[Record]) -> list[Record]:
    """The records in an order of chance, always the same: such files are sorted by label, and whoever takes the first or the
    last hundred of them wants all labels."""
    found = list(records)
    random.Random(0).shuffle(found)
    return found


@register("banking77", kind=CLASSIFY)
def banking77(split: str, folder: Path | None) -> list[Record]:
    """``train.csv`` and ``test.csv`` with the columns text and category; :func:`mixed`."""
    held = "train" if split == "train" else "test"
    if folder is not None:
        return mixed(from_file(file_of(folder, f"banking77/{held}.csv", f"{held}.csv"), "text", "category"))
    return mixed(Record(row["text"], answer=row["label_text"]) for row in from_hub("mteb/banking77", None, held))


@register("clinc150", kind=CLASSIFY)
def clinc150(split: str, folder: Path | None) -> list[Record]:
    """``data_full.json``: for each split a list of [text, intent], and one of those out of scope; :func:`mixed`."""
    return mixed(_clinc150(split, folder))


def _clinc150(split: str, folder: Path | None) -> Iterator[Record]:
    if folder is None:
        rows = from_hub("clinc/clinc_oos", "plus", split)
        yield from (Record(row["text"], answer=str(row["intent"])) for row in rows)
        return
    path = file_of(folder, "clinc150/data_full.json", "data_full.json")
    held = {"validation": "val"}.get(split, split)
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        for text, intent in [*whole[held], *whole[f"oos_{held}"]]:
            yield Record(text, answer=intent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is not CLINC150's data_full.json: {error}") from error
