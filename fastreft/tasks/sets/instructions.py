"""Following instructions: Alpaca's and Ultrafeedback's records in Alpaca's words, judged elsewhere on AlpacaEval's 805 prompts.

``fastreft eval`` writes what AlpacaEval reads: a list of {instruction, output, generator, dataset}. ReFT, section 4.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..read import read_records, text_of
from .places import file_of, from_hub
from .registry import Record, register

# Stanford Alpaca's two prompts (Taori et al. 2023).
_HEAD = "Below is an instruction that describes a task"
ALONE = _HEAD + (
    ". Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = _HEAD + (
    ", paired with an input that provides further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_EVAL = ("alpaca_eval.json", "alpaca_eval/test.json", "alpaca_eval_text_davinci_003.json")


def ask(instruction: str, given: str = "") -> str:
    """An instruction, and what it is about if anything, in Alpaca's words."""
    return WITH_INPUT.format(instruction=instruction, input=given) if given else ALONE.format(instruction=instruction)


def from_record(record: dict[str, Any], where: str) -> Record:
    """Alpaca's record {instruction, input, output}."""
    instruction, given = text_of(record, "instruction", where), record.get("input") or ""
    if not isinstance(given, str):
        raise UserError(f"the field 'input' in {where} is {type(given).__name__}, not text")
    return Record(
        ask(instruction, given), text_of(record, "output", where), about={"instruction": instruction}, where=where
    )


def alpaca_eval(folder: Path | None) -> Iterator[Record]:
    """AlpacaEval's 805 prompts, with the reference's answers."""
    rows = (
        read_records(file_of(folder, *ALPACA_EVAL))
        if folder is not None
        else (("", row) for row in from_hub("tatsu-lab/alpaca_eval", None, "eval", file="alpaca_eval.json"))
    )
    for where, row in rows:
        instruction = text_of(row, "instruction", where)
        about = {"instruction": instruction, "dataset": row.get("dataset", "alpaca_eval")}
        yield Record(ask(instruction), str(row.get("output", "")), about=about)


def _reader(hub: str, *files: str) -> Callable[[str, Path | None], Iterator[Record]]:
    def read(split: str, folder: Path | None) -> Iterator[Record]:
        if split == "test":
            yield from alpaca_eval(folder)
        elif folder is not None:
            for where, record in read_records(file_of(folder, *files)):
                yield from_record(record, where)
        else:
            for i, record in enumerate(from_hub(hub, None, split), 1):
                yield from_record(record, f"record {i} of {hub}")

    return read


register("alpaca", metrics=(), max_new_tokens=512)(
    _reader("yahma/alpaca-cleaned", "alpaca/train.json", "alpaca_data_cleaned.json", "alpaca_en_demo.json")
)
register("ultrafeedback", metrics=(), max_new_tokens=512)(
    _reader("zwu01/ultrafeedback", "ultrafeedback/train.json", "ultrafeedback.json", "ultrafeedback_1k.json")
)
