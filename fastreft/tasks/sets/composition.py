"""Composition: two tasks in two groups of R's rows, each trained by its own records, and used together on neither's.

Of rank 8, rows 0-3 learn to go on in German after an English text, rows 4-7 to follow instructions in English; both
together are to follow instructions in German (ReFT, Wu et al. 2024, the appendix on composition; pyreft's ``compreft``, of
which the files are: HellaSwag_de and 1,000 records of Ultrafeedback). Scored are AlpacaEval's prompts by each group and by
both: how many answers are German, and how long they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..read import read_records, text_of
from . import instructions
from .language import language_of
from .places import file_of, from_hub
from .registry import Record, register, register_family

GERMAN, INSTRUCT = "german", "instruct"  # the groups of rows
BOTH = f"{GERMAN}+{INSTRUCT}"
GERMAN_FILES = ("hellaswag_de.jsonl", "hellaswag_de.json", "german.jsonl", "german.json")
INSTRUCT_FILES = ("ultrafeedback_1k.json", "ultrafeedback.json", "ultrafeedback/train.json")


def _german(row: dict[str, Any], where: str) -> Record:
    """HellaSwag_de's {ctx, endings_de, label}, the right ending; or Alpaca's {instruction, output}."""
    if "endings_de" not in row:
        return instructions.from_record(row, where)
    endings = row["endings_de"]
    if not isinstance(endings, list) or not endings or not all(isinstance(ending, str) for ending in endings):
        raise UserError(f"the field 'endings_de' in {where} is not a list of texts")
    label = str(row.get("label"))
    if not label.isdecimal():
        raise UserError(f"the field 'label' in {where} is {row.get('label')!r}; it must be the number of an ending")
    # Some lack an ending: the last is taken, as pyreft's example takes it.
    ending = endings[int(label)] if len(endings) == 4 and int(label) < 4 else endings[-1]
    return Record(instructions.ask(text_of(row, "ctx", where)), ending, where=where)


def _rows(folder: Path | None, files: tuple[str, ...], hub: str) -> Iterable[tuple[str, dict[str, Any]]]:
    if folder is not None:
        return read_records(file_of(folder, *files))
    return ((f"record {i} of {hub}", row) for i, row in enumerate(from_hub(hub, None, "train"), 1))


def train(split: str, folder: Path | None) -> Iterator[Record]:
    """The records of both groups, taking turns while there are both."""
    german = (_german(row, where) for where, row in _rows(folder, GERMAN_FILES, "LeoLM/HellaSwag_de"))
    others = _rows(folder, INSTRUCT_FILES, "zwu01/ultrafeedback")
    instruct = (instructions.from_record(row, where) for where, row in others)
    for pair in zip_longest(german, instruct):
        for group, record in zip((GERMAN, INSTRUCT), pair, strict=True):
            if record is not None:
                yield record.by(group)


def _seen(text: str) -> tuple[str | None, int]:
    """What counts of an answer: its language, and how many words it has."""
    return language_of(text), len(text.split())


def _by(group: str) -> None:
    """Register the test of a group, or of both."""

    @register(
        f"composition_{'both' if group == BOTH else group}",
        answer_of=_seen,
        same=lambda found, wanted: found[0] == wanted,
        metrics=("german", "words"),
        max_new_tokens=64,
    )
    def read(split: str, folder: Path | None) -> Iterator[Record]:
        if split != "test":
            yield from (record for record in train(split, folder) if record.subspaces in group.split("+"))
            return
        for record in instructions.alpaca_eval(folder):
            language = "en" if group == INSTRUCT else "de"
            yield Record(record.prompt, record.completion, language, about=record.about, subspaces=group)


for _group in (GERMAN, INSTRUCT, BOTH):
    _by(_group)
register_family("composition", (f"composition_{name}" for name in (GERMAN, INSTRUCT, "both")), train)
