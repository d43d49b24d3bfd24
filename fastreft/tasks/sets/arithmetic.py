"""Seven sets of arithmetic word problems, as LLM-Adapters (Hu et al. 2023, arXiv 2304.01933) puts them and ReFT (section 4.3)
trains: Alpaca's words round the problem, a rationale to learn, and the last number, or for AQuA the letter, as the answer.

A folder is LLM-Adapters' own (``dataset/gsm8k/test.json``, ``ft-training_set/math_10k.json``) or has ``gsm8k/train.jsonl`` and
so on, GSM8K's own files among them: those have another question behind the problem, and calculations within << and >>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..read import read_records, text_of
from .answers import close, last_number, letter
from .instructions import ask
from .places import file_of, from_hub
from .registry import Record, register, register_family

STEP_BY_STEP = "{question}\nAnswer the above question. First think step by step and then answer the final number.\n"
MATH_10K = ("math_10k.json", "ft-training_set/math_10k.json", "math_10k/train.json", "dataset/math_10k/train.json")
SETS = ("MultiArith", "gsm8k", "SVAMP", "mawps", "AddSub", "AQuA", "SingleEq")


def _own_of_gsm8k(record: dict[str, Any], where: str) -> Record:
    question, solution = text_of(record, "question", where), text_of(record, "answer", where)
    rationale, mark, answer = solution.rpartition("####")
    wanted = last_number(answer)
    if not mark or wanted is None:
        raise UserError(f"the field 'answer' in {where} has no '#### number' at its end")
    completion = f"{rationale}The final answer is: {answer.strip()}"
    return Record(STEP_BY_STEP.format(question=question), completion, wanted, about={"instruction": question})


def _of_adapters(record: dict[str, Any], where: str) -> Record:
    """LLM-Adapters' records; MAWPS' training file has a text and an answer and no rationale."""
    if "original_text" in record:
        question, answer, rationale = text_of(record, "original_text", where), str(record.get("ans")), ""
    else:
        question, answer = text_of(record, "instruction", where), str(record.get("answer", "")).strip()
        rationale = str(record.get("output") or "").strip()
    wanted: Any = answer if answer in tuple("ABCDE") else last_number(answer)
    if wanted is None:
        raise UserError(f"the answer in {where} is {answer!r}, which is neither a number nor a letter from A to E")
    written = f"{int(wanted)}" if isinstance(wanted, float) and wanted.is_integer() else f"{wanted}"
    return Record(ask(question), rationale or f"The answer is {written}.", wanted, about={"instruction": question})


def from_file(path: Path) -> Iterator[Record]:
    """The records of a file of either kind."""
    for where, record in read_records(path):
        yield _own_of_gsm8k(record, where) if "question" in record else _of_adapters(record, where)


def _reader(name: str) -> Callable[[str, Path | None], Iterator[Record]]:
    def read(split: str, folder: Path | None) -> Iterator[Record]:
        if folder is not None:
            stems = [f"{name}/{split}", f"dataset/{name}/{split}", *([f"{name}/trainset"] if split == "train" else [])]
            yield from from_file(file_of(folder, *(f"{stem}{end}" for stem in stems for end in (".json", ".jsonl"))))
        elif name == "gsm8k":
            for i, record in enumerate(from_hub("openai/gsm8k", "main", split), 1):
                yield _own_of_gsm8k(record, f"record {i} of openai/gsm8k")
        else:
            raise UserError(f"the task '{name}' is read from a folder of LLM-Adapters' files; give --data_dir")

    return read


def _math_10k(split: str, folder: Path | None) -> Iterator[Record]:
    """The 10,000 training problems in one file, where it is; else GSM8K's."""
    if folder is not None and any((folder / name).is_file() for name in MATH_10K):
        yield from from_file(file_of(folder, *MATH_10K))
    else:
        yield from _reader("gsm8k")(split, folder)


for _name in SETS:
    if _name == "AQuA":
        register(_name, answer_of=letter, max_new_tokens=512)(_reader(_name))
    else:
        register(_name, answer_of=last_number, same=close, max_new_tokens=256 if _name == "gsm8k" else 512)(
            _reader(_name)
        )
register_family("arithmetic", SETS, _math_10k)
