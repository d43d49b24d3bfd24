"""Eight sets of commonsense questions, as LLM-Adapters (Hu et al. 2023, arXiv 2304.01933) puts them and ReFT (section 4.2)
trains: "Please choose ...", and "the correct answer is X" to learn. BoolQ is asked without its passage, as there.

A folder is LLM-Adapters' own, ``dataset/boolq/test.json`` and ``ft-training_set/commonsense_170k.json``, or has
``boolq/train.json`` and so on; the hub's sets are put into the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..read import read_records, text_of
from .answers import TRIGGER, choice
from .labelled import mixed
from .places import CONVERTED, file_of, from_hub
from .registry import Record, register, register_family

# The words round a question, from a record of the hub: (question, options by their names, the right one's name).
Worded = Callable[[dict[str, Any]], tuple[str, dict[str, str], str]]
CHOOSE = "Please choose the correct {what} to the question: {question}"


def _record(instruction: str, answer: str) -> Record:
    return Record(f"{instruction}\n", f"{TRIGGER}{answer}", answer, about={"instruction": instruction})


def in_words(question: str, options: dict[str, str]) -> str:
    """LLM-Adapters' instruction."""
    between = "\n\n" if "solution1" in options else " "
    listed = between.join(f"{name.capitalize()}: {text}" for name, text in options.items() if text)
    body = f"{question}\n\n{listed}" if listed else question
    return f"{body}\n\nAnswer format: {'/'.join(options)}"


def _numbered(word: str, texts: Iterable[str]) -> dict[str, str]:
    return {f"{word}{i}": text for i, text in enumerate(texts, 1)}


def _boolq(r: dict[str, Any]) -> tuple[str, dict[str, str], str]:
    question = f"Please answer the following question with true or false, question: {r['question']}?"
    return question, {"true": "", "false": ""}, str(r["answer"]).lower()


def _piqa(r: dict[str, Any]) -> tuple[str, dict[str, str], str]:
    question = CHOOSE.format(what="solution", question=r["goal"])
    return question, _numbered("solution", (r["sol1"], r["sol2"])), f"solution{int(r['label']) + 1}"


def _siqa(r: dict[str, Any]) -> tuple[str, dict[str, str], str]:
    question = CHOOSE.format(what="answer", question=f"{r['context']} {r['question']}")
    return question, _numbered("answer", (r["answerA"], r["answerB"], r["answerC"])), f"answer{r['label']}"


def _hellaswag(r: dict[str, Any]) -> tuple[str, dict[str, str], str]:
    question = (
        "Please choose the correct ending to complete the given sentence: "
        f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}".rstrip()
    )
    return question, _numbered("ending", r["endings"]), f"ending{int(r['label']) + 1}"


def _winogrande(r: dict[str, Any]) -> tuple[str, dict[str, str], str]:
    question = f"Please choose the correct answer to fill in the blank to complete the given sentence: {r['sentence']}"
    return question, _numbered("option", (r["option1"], r["option2"])), f"option{r['answer']}"


def _science(r: dict[str, Any]) -> tuple[str, dict[str, str], str]:
    """ARC's and OpenBookQA's."""
    asked = r["question"] if "question" in r else r["question_stem"]
    right = list(r["choices"]["label"]).index(r["answerKey"]) + 1
    return CHOOSE.format(what="answer", question=asked), _numbered("answer", r["choices"]["text"]), f"answer{right}"


# name: (what an answer may be, the hub's name and configuration, its test split with answers, its words)
SETS: dict[str, tuple[str, tuple[str, str | None, str], Worded]] = {
    "boolq": ("true|false", ("google/boolq", None, "validation"), _boolq),
    "piqa": ("solution[12]", ("ybisk/piqa", None, "validation"), _piqa),
    "social_i_qa": ("answer[123]", ("allenai/social_i_qa", None, "validation"), _siqa),
    "hellaswag": ("ending[1-4]", ("Rowan/hellaswag", None, "validation"), _hellaswag),
    "winogrande": ("option[12]", ("allenai/winogrande", "winogrande_debiased", "validation"), _winogrande),
    "ARC-Easy": ("answer[1-5]", ("allenai/ai2_arc", "ARC-Easy", "test"), _science),
    "ARC-Challenge": ("answer[1-5]", ("allenai/ai2_arc", "ARC-Challenge", "test"), _science),
    "openbookqa": ("answer[1-4]", ("allenai/openbookqa", "main", "test"), _science),
}
SCRIPTS = ("piqa", "social_i_qa")


def from_adapters(path: Path) -> Iterator[Record]:
    """The records of one of LLM-Adapters' files."""
    for where, record in read_records(path):
        yield _record(text_of(record, "instruction", where), text_of(record, "answer", where).strip())


def _reader(name: str) -> Callable[[str, Path | None], Iterator[Record]]:
    _, (hub, config, tested), worded = SETS[name]

    def read(split: str, folder: Path | None) -> Iterator[Record]:
        if folder is not None:
            yield from from_adapters(file_of(folder, f"{name}/{split}.json", f"dataset/{name}/{split}.json"))
            return
        revision = CONVERTED if name in SCRIPTS else None
        for record in from_hub(hub, config, tested if split == "test" else split, revision):
            question, options, right = worded(record)
            yield _record(in_words(question, options), right)

    return read


def _all_of_them(split: str, folder: Path | None) -> Iterator[Record]:
    """The 170,420 training questions of all eight in one file, where it is; else each set's own, mixed, so that the last of
    them are of all."""
    whole = "commonsense_170k"
    files = [f"{whole}.json", f"ft-training_set/{whole}.json", f"{whole}/train.json", f"dataset/{whole}/train.json"]
    if folder is not None and any((folder / name).is_file() for name in files):
        yield from from_adapters(file_of(folder, *files))
        return
    places = ("{}/{}.json", "dataset/{}/{}.json")
    there = [name for name in SETS if folder is None or any((folder / p.format(name, split)).is_file() for p in places)]
    yield from mixed(record for name in there for record in _reader(name)(split, folder))


for _name in SETS:
    register(_name, answer_of=choice(SETS[_name][0]))(_reader(_name))
register_family("commonsense", SETS, _all_of_them)
