"""Words with a tag each: CoNLL-2003's people, places, organisations and others, or files of your own.

CoNLL-2003 (Tjong Kim Sang and De Meulder 2003). A file is of columns, a word a line and a blank line between sentences, or has
records with a list of words and a list of tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..read import lines_of
from .places import CONVERTED, file_of, from_hub
from .registry import TAG, Record, register

COLUMNS = (".conll", ".bio", ".iob", ".iob2")  # endings of files of columns, whatever else their fields say
_DOCUMENT = "-DOCSTART-"  # a sentence of its own that begins a document
CONLL = ("O", *(f"{prefix}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for prefix in "BI"))  # the hub's order


def tagged(words: list[str], tags: list[str], where: str = "") -> Record:
    """The record of a sentence, for a task of the kind "tag"; :class:`UserError` where there is no tag for each word."""
    if not words or len(words) != len(tags):
        raise UserError(
            f"{where} has {len(words)} words and {len(tags)} tags; it must have a tag for each word, and one word"
        )
    return Record(" ".join(words), answer=tuple(tags), words=tuple(words), where=where)


def of_columns(path: Path | str, text: str, label: str) -> bool:
    """Whether a file is of columns: by its ending, or as its fields are numbers; :class:`UserError` for names of columns."""
    suffix, numbered = Path(path).suffix, all(re.fullmatch(r"-?[1-9]\d*", name) for name in (text, label))
    if suffix in COLUMNS and not numbered:
        raise UserError(
            f"text_field is '{text}' and label_field '{label}', and '{path}' has columns without names: give their numbers, "
            "1 for the first, -1 for the last"
        )
    return numbered and suffix not in (".json", ".jsonl", ".csv")


def from_columns(path: Path | str, text: str = "1", label: str = "-1") -> Iterator[Record]:
    """The sentences of a file of columns, which tabs or blanks part; ``text`` and ``label`` number them, from 1 or, below 0,
    from the end."""
    words: list[str] = []
    tags: list[str] = []
    start, wanted = 1, 0
    for i, line in enumerate([*lines_of(path), ""], 1):
        if not line.strip(" \t"):
            if words and words != [_DOCUMENT]:
                yield tagged(words, tags, f"the sentence from line {start} of '{path}'")
            words, tags = [], []
            continue
        cells = line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))  # other blanks are parts of words
        wanted = wanted or len(cells)
        if len(cells) != wanted:
            raise UserError(f"line {i} of '{path}' has {len(cells)} columns, and the first has {wanted}")
        start = i if not words else start
        words.append(_cell(cells, text, "text_field", i, path))
        tags.append(_cell(cells, label, "label_field", i, path))


def _cell(cells: list[str], number: str, name: str, line: int, path: Path | str) -> str:
    at = int(number)
    if abs(at) > len(cells):
        raise UserError(f"{name} is {number}, and line {line} of '{path}' has {len(cells)} columns")
    value = cells[at - 1 if at > 0 else at].strip(" ")
    if not value:
        raise UserError(f"column {number} in line {line} of '{path}' is empty")
    return value


def from_lists(row: dict[str, Any], text: str, label: str, where: str) -> Record:
    """The record of a list of words and a list of tags, which are names or numbers."""
    for name in (text, label):
        value = row.get(name)
        kinds: tuple[type, ...] = (str,) if name == text else (str, int)
        if name not in row:
            raise UserError(f"{where} has no field '{name}' among {', '.join(map(str, row))}{nearest(name, row)}")
        if not isinstance(value, list) or not all(isinstance(item, kinds) for item in value):
            raise UserError(f"the field '{name}' in {where} is not a list of {'words' if name == text else 'tags'}")
    return tagged(row[text], [str(tag) for tag in row[label]], where)


@register("conll2003", kind=TAG, labels=CONLL)
def conll2003(split: str, folder: Path | None) -> Iterator[Record]:
    """``train.txt``, ``valid.txt``, ``test.txt``, or the original's names."""
    if folder is not None:
        stem, original = {"train": ("train", "train"), "validation": ("valid", "testa"), "test": ("test", "testb")}[
            split
        ]
        yield from from_columns(file_of(folder, f"conll2003/{stem}.txt", f"{stem}.txt", f"eng.{original}"))
        return
    for i, row in enumerate(from_hub("eriktks/conll2003", None, split, revision=CONVERTED), 1):
        yield tagged(row["tokens"], [CONLL[tag] for tag in row["ner_tags"]], f"record {i} of eriktks/conll2003")
