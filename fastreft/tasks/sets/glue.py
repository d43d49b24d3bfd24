"""GLUE (Wang et al. 2018): eight sets of sentences and pairs to be classified, STS-B to be given a number. ReFT, section 4.5.

A folder has the tables as GLUE has them (``SST-2/train.tsv``, whose quotes are text); the test split's labels were never
published, so that "test" is the development set, MNLI's the matched one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..read import read_table, text_of
from .places import file_of, from_hub
from .registry import CLASSIFY, REGRESS, Record, register

_ENTAILS = ("entailment", "not_entailment")
_SAME = ("not_duplicate", "duplicate")


@dataclass(frozen=True)
class Table:
    """One of GLUE's: its folder, the columns of its texts and its label in the tables and on the hub, and its labels in the
    hub's order (none: a number)."""

    folder: str
    columns: tuple[str, ...]
    label: str
    hub_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] = ()  # of a table without one
    matched: str = ""
    broken: bool = False  # some lines lack columns


TABLES = {
    "cola": Table("CoLA", ("text",), "label", ("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy"),
                  ("source", "label", "mark", "text")),
    "sst2": Table("SST-2", ("sentence",), "label", ("sentence",), ("negative", "positive")),
    "mrpc": Table("MRPC", ("#1 String", "#2 String"), "Quality", ("sentence1", "sentence2"),
                  ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": Table("QQP", ("question1", "question2"), "is_duplicate", ("question1", "question2"), _SAME, ("accuracy", "f1"),
                 broken=True),
    "mnli": Table("MNLI", ("sentence1", "sentence2"), "gold_label", ("premise", "hypothesis"),
                  ("entailment", "neutral", "contradiction"), matched="_matched"),
    "qnli": Table("QNLI", ("question", "sentence"), "label", ("question", "sentence"), _ENTAILS),
    "rte": Table("RTE", ("sentence1", "sentence2"), "label", ("sentence1", "sentence2"), _ENTAILS),
    "stsb": Table("STS-B", ("sentence1", "sentence2"), "score", ("sentence1", "sentence2"), (), ("pearson", "spearman")),
}  # fmt: skip


def _answer(table: Table, value: str, where: str) -> Any:
    """The label's number, of its name or its number; a score as it is."""
    try:
        if not table.labels:
            return float(value)
        return table.labels.index(value) if value in table.labels else range(len(table.labels))[int(value)]
    except (ValueError, IndexError):
        wanted = ", ".join(table.labels) or "a number"
        raise UserError(f"the field '{table.label}' in {where} is {value!r}; it must be one of {wanted}") from None


def _reader(name: str, table: Table) -> Callable[[str, Path | None], Iterator[Record]]:
    def read(split: str, folder: Path | None) -> Iterator[Record]:
        held = "train" if split == "train" else f"dev{table.matched}"
        if folder is not None:
            for where, row in read_table(file_of(folder, f"{table.folder}/{held}.tsv"), table.header, table.broken):
                first, *second = (text_of(row, column, where) for column in table.columns)
                yield Record(
                    first, answer=_answer(table, text_of(row, table.label, where), where), pair=(*second, None)[0]
                )
            return
        on_hub = "train" if split == "train" else f"validation{table.matched}"
        for row in from_hub("nyu-mll/glue", name, on_hub):
            first, *second = (row[column] for column in table.hub_columns)
            yield Record(first, answer=row["label"], pair=(*second, None)[0])

    return read


for _name, _table in TABLES.items():
    register(
        _name, kind=CLASSIFY if _table.labels else REGRESS, labels=_table.labels, metrics=_table.metrics
    )(_reader(_name, _table))  # fmt: skip
