"""What a command is told of its data -> records, before a model is loaded: what is wrong with them is said at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import UserError, nearest
from .flags.data import DataArguments
from .modules import run_module
from .read import read_records, text_of
from .sets import Record, TaskSet, find, training_records
from .sets.answers import close, extractor
from .sets.entities import OUTSIDE
from .sets.instructions import from_record
from .sets.labelled import from_file, mixed
from .sets.registry import CLASSIFY, GENERATE, NAMED, TAG, USUAL


@dataclass
class Data:
    """The records of a run. ``scored``: the tasks whose test records are scored afterwards; ``notes``: for the user."""

    kind: str
    train: list[Record]
    evaluated: list[Record] = field(default_factory=list)
    scored: list[TaskSet] = field(default_factory=list)
    evaluated_on_test: bool = False  # the same records as scored
    labels: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an evaluation measures, the first what counts: the task's; of a file its kind's, without entities where every
        word has a tag of its own, such as its part of speech."""
        if self.scored:
            return self.scored[0].metrics
        return USUAL[self.kind] if self.kind != TAG or OUTSIDE in self.labels else ("token_accuracy",)


def folder_of(arguments: DataArguments) -> Path | None:
    """The folder of --data_dir."""
    return None if arguments.data_dir is None else Path(arguments.data_dir).expanduser()


def tasks_of(arguments: DataArguments) -> list[TaskSet]:
    """The tasks that --task names, those of --task_module registered first."""
    if arguments.task_module is not None:
        run_module(arguments.task_module)
    return find(str(arguments.task))


def of_file(path: str, arguments: DataArguments) -> Iterator[Record]:
    """The records of a file of the user's: labelled texts or words, chats, prompts and completions, or Alpaca's fields."""
    if arguments.label_field is not None:
        yield from from_file(path, str(arguments.text_field), arguments.label_field, arguments.pair_field)
        return
    for where, row in read_records(path):
        subspaces = _subspaces(row, arguments.subspaces_field, where)
        if arguments.messages_field:
            yield Record("", messages=_messages(row, arguments.messages_field, where), subspaces=subspaces, where=where)
        elif arguments.prompt_field == "prompt" and "prompt" not in row and {"instruction", "output"} <= {*row}:
            yield from_record(row, where).by(subspaces)
        else:
            prompt = text_of(row, arguments.prompt_field, where)
            completion = text_of(row, arguments.completion_field, where)
            yield Record(prompt, completion, subspaces=subspaces, where=where)


def _subspaces(row: dict[str, Any], name: str | None, where: str) -> Any:
    if name is not None and row.get(name) is None:
        raise UserError(f"{where} has no field '{name}'{nearest(name, row)}")
    return None if name is None else row[name]


def _some_of(path: str, arguments: DataArguments) -> list[Record]:
    """:func:`of_file`'s; :class:`UserError` where there are none."""
    found = list(of_file(path, arguments))
    if not found:
        raise UserError(f"the data file '{path}' has no records")
    return found


def _kind_of(records: Sequence[Record], arguments: DataArguments) -> str:
    """What the records of a file are for."""
    if arguments.label_field is None:
        return GENERATE
    return CLASSIFY if records[0].words is None else TAG


def answers_of_file(arguments: DataArguments, answer_field: str, extract: str) -> TaskSet:
    """The records of ``eval_file`` as a task: an answer is to be found in what is written, as in the field that holds it."""
    path, answer_of = str(arguments.eval_file), extractor(extract)
    found = []
    for where, row in read_records(path):
        prompt, said = text_of(row, arguments.prompt_field, where), row.get(answer_field)
        # text_of says what is not there
        answer = answer_of(text_of(row, answer_field, where) if said in (None, "") else str(said))
        if answer is None:
            raise UserError(f"the field '{answer_field}' in {where} is {said!r}, in which there is no {extract}")
        found.append(Record(prompt, answer=answer, about={"prompt": prompt}, where=where))
    if not found:
        raise UserError(f"the data file '{path}' has no records")
    same: dict[str, Any] = {"same": close} if extract == "number" else {}
    return TaskSet(Path(path).name, lambda split, folder: found, answer_of=answer_of, max_new_tokens=256, **same)


def set_of_file(arguments: DataArguments) -> TaskSet:
    """The records of ``eval_file`` as a task: labels are to be found, or completions to be written word for word."""
    path = str(arguments.eval_file)
    found = _some_of(path, arguments)
    kind = _kind_of(found, arguments)

    def read(split: str, folder: Path | None) -> Iterator[Record]:
        for record in found:
            if kind != GENERATE:
                yield record
            elif record.messages is not None:
                *asked, answer = record.messages
                yield replace(record, answer=str(answer.get("content", "")).strip(), about={"messages": asked})
            else:
                yield replace(record, answer=record.completion.strip(), about={"prompt": record.prompt})

    return TaskSet(Path(path).name, read, kind, metrics=("exact match",) if kind == GENERATE else USUAL[kind])


def _messages(row: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    if name not in row:
        raise UserError(f"{where} has no field '{name}'{nearest(name, row)}")
    messages = row[name]
    well_formed = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)
    if not well_formed or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"the field '{name}' in {where} is not a list of messages that ends with the assistant's")
    return messages


def gather(arguments: DataArguments) -> Data:
    """All that a training reads; :class:`UserError` for what is wrong with it."""
    if arguments.task is not None:
        sets = tasks_of(arguments)
        train, left_out = training_records(arguments.task, folder_of(arguments))
        data = Data(sets[0].kind, train, labels=sets[0].labels)
        if left_out:
            data.notes.append(f"{left_out} training records are among the test's and were left out")
        _find_tests(data, sets, arguments)
    else:
        records = _some_of(str(arguments.train_file), arguments)
        kind = _kind_of(records, arguments)
        data = Data(kind, mixed(records) if kind == CLASSIFY else records)
    if arguments.max_train_records is not None:
        data.train = data.train[: arguments.max_train_records]
    if arguments.eval_file is not None:
        data.evaluated = _some_of(arguments.eval_file, arguments)[: arguments.max_eval_records]
    elif arguments.hold_out:
        if arguments.hold_out >= len(data.train):
            raise UserError(f"hold_out is {arguments.hold_out}, and there are {len(data.train)} training records")
        data.train, data.evaluated = data.train[: -arguments.hold_out], data.train[-arguments.hold_out :]
    elif data.kind != GENERATE and data.scored:
        data.evaluated, data.evaluated_on_test = to_score(data.scored[0], arguments), True
    if data.kind in NAMED:
        data.labels = data.labels or tuple(sorted({name for record in data.train for name in _names(record)}))
        _check_labels(data)
    return data


def _find_tests(data: Data, sets: Sequence[TaskSet], arguments: DataArguments) -> None:
    """Of the tasks those whose test records are there, which are scored; a note for each other, before it is trained on."""
    for task in sets:
        try:
            if task.metrics:  # what is judged elsewhere is not scored
                task.records("test", folder_of(arguments))
            data.scored.append(task)
        except UserError as error:
            data.notes.append(f"{task.name} will not be scored: {error}")


def to_score(task: TaskSet, arguments: DataArguments, split: str = "test") -> list[Record]:
    """The records of a task that are scored."""
    return task.records(split, folder_of(arguments))[: arguments.max_eval_records]


def label_index(record: Record, labels: tuple[str, ...]) -> int:
    """The number of a record's label; -1 where it is none of ``labels``."""
    if isinstance(record.answer, int):
        return record.answer
    return labels.index(record.answer) if record.answer in labels else -1


def _names(record: Record) -> tuple[str, ...]:
    """The labels of a record: one, or one a word."""
    return (str(record.answer),) if record.words is None else tuple(record.answer)


def _check_labels(data: Data) -> None:
    for record in (*data.train, *data.evaluated):
        if (record.words is not None) is not (data.kind == TAG):
            kinds = ("one label", "a list of tags")
            came, wanted = kinds if record.words is None else kinds[::-1]
            raise UserError(f"{record.where or 'a record'} has {came}, and the others have {wanted}")
    if len(data.labels) < 2:
        raise UserError(f"the training records have {len(data.labels)} label; classifying takes two at least")
    for whose, records in (("to train on", data.train), ("to evaluate", data.evaluated)):
        check_known(records, data.labels, whose)


def check_known(records: Sequence[Record], labels: tuple[str, ...], whose: str) -> None:
    """:class:`UserError` for a record with a label that is none of ``labels``; ``whose`` says what the records are for."""
    known = set(labels)
    named = (name for record in records if not isinstance(record.answer, int) for name in _names(record))
    unknown = next((name for name in named if name not in known), None)
    if unknown is not None:
        others = f"the {len(known)} labels that there are{nearest(unknown, known)}"
        raise UserError(f"the label {unknown!r} of a record {whose} is none of {others}")
