"""``fastreft eval``: what adapters, and the untouched model, score on a task or on records of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from .errors import UserError
from .flags.eval import EvalArguments
from .models import longest
from .records import answers_of_file, check_known, set_of_file, tasks_of, to_score
from .run_log import read_log, write_rows
from .scoring import Score, completion_loss, mean_and_spread, score
from .sets import Record, TaskSet
from .sets.registry import GENERATE, NAMED
from .trained import is_adapter, load_trained


def _sets(arguments: EvalArguments, folder: str | None, log: dict[str, Any]) -> list[TaskSet]:
    """What is scored: a file, or the tasks that are named or were trained on."""
    if arguments.eval_file is not None:
        if arguments.answer_field is not None:
            made = answers_of_file(arguments.data(None), arguments.answer_field, arguments.extract)
        else:
            made = set_of_file(arguments.data(None))
        fields = dict.fromkeys(NAMED, "give --text_field and --label_field")
        fields[GENERATE] = "leave text_field and label_field out"
        advice = f" by the fields given; {fields.get(str(log.get('kind')), 'give a --task')}"
        _check_kind(folder, log, made.kind, arguments.eval_file, advice)
        return [made]
    name = arguments.task or log.get("task")
    if not name:
        raise UserError(f"'{folder}' does not say what it was trained on; give --task or --eval_file")
    found = tasks_of(arguments.data(name))
    _check_kind(folder, log, found[0].kind, name)
    return found


def _check_kind(folder: str | None, log: dict[str, Any], kind: str, name: str, advice: str = "") -> None:
    """:class:`UserError` for what a model was not trained to do."""
    if log.get("kind") not in (None, kind):
        raise UserError(f"'{folder}' was trained to {log['kind']}, and '{name}' is to {kind}{advice}")


def _records(arguments: EvalArguments, task: TaskSet, labels: tuple[str, ...]) -> list[Record]:
    """What is scored of a task; :class:`UserError` for labels that the training did not know."""
    found = to_score(task, arguments.data(task.name), arguments.split)
    if task.kind in NAMED:
        if task.labels and task.labels != labels:  # a record's label may be their number
            raise UserError(
                f"the labels of '{task.name}' are {', '.join(task.labels)}, and those of the training {', '.join(labels)}"
            )
        check_known(found, labels, "to evaluate")
    return found


def _all_records(arguments: EvalArguments, sets: list[TaskSet], labels: tuple[str, ...]) -> dict[TaskSet, list[Record]]:
    """:func:`_records` of each task; of several, those that are there, and a note for each other."""
    found, missing = {}, []
    for task in sets:
        try:
            found[task] = _records(arguments, task, labels)
        except UserError as error:
            if len(sets) == 1:
                raise
            missing.append(f"{task.name} is not scored: {error}")
    if not found:
        raise UserError("; ".join(missing))
    for text in missing:
        print(f"note: {text}")
    return found


def _score(
    arguments: EvalArguments,
    task: TaskSet,
    records: list[Record],
    model: Any,
    tokenizer: Any,
    labels: tuple[str, ...],
    how: dict[str, Any],
) -> Score:
    """:func:`score`; of a file's completions with their loss, and as many tokens written as the longest has, and its end."""
    if arguments.max_new_tokens is not None:
        task = replace(task, max_new_tokens=arguments.max_new_tokens)
    if arguments.eval_file is None or task.kind != GENERATE or arguments.answer_field is not None:
        return score(task, records, model, tokenizer, labels=labels, **how)
    if arguments.max_new_tokens is None:
        task = replace(task, max_new_tokens=_longest(records, tokenizer) + 1)
    found = score(task, records, model, tokenizer, **how)
    loss, cut, dropped = completion_loss(records, model, tokenizer, too_long=arguments.too_long, **how)
    for many, what in ((cut, "cut"), (dropped, "left out")):
        if many:
            print(
                f"note: {many} records of {task.name} were {what} at max_length = {how['max_length']} tokens for the loss"
            )
    return replace(found, metrics={**found.metrics, "loss": loss})


def _longest(records: list[Record], tokenizer: Any) -> int:
    """Tokens of the longest completion."""
    return max(len(tokenizer(record.completion or record.answer).input_ids) for record in records)


def _scores(arguments: EvalArguments, folder: str | None, base: bool) -> Iterator[tuple[str, Score]]:
    """(whose, score) of each task for one adapter and, with ``base``, of the model under it."""
    log = read_log(folder) if folder is not None else {}
    sets = _sets(arguments, folder, log)
    labels = tuple(log.get("labels") or sets[0].labels)
    if sets[0].kind in NAMED and not labels:
        raise UserError(
            f"the labels of '{sets[0].name}' are those of a training; score what 'fastreft train' wrote for them"
        )
    records = _all_records(arguments, sets, labels)
    trained = load_trained(
        folder, arguments.model, dtype=arguments.dtype, trust_remote_code=arguments.trust_remote_code, kind=sets[0].kind,
        labels=labels,
    )  # fmt: skip
    model, tokenizer = trained.model, trained.tokenizer
    how: dict[str, Any] = {
        "chat": arguments.chat or bool(log.get("chat")),
        "batch_size": arguments.batch_size,
        "max_length": longest(log.get("max_length"), trained.config),
    }
    adapted = folder is not None and is_adapter(folder)
    for task, some in records.items():
        # The base of a classifier is a fresh head, whose score is nobody's.
        untouched = base and task.kind == GENERATE and (adapted or folder is None)
        if base and not untouched:
            why = "everything was trained" if task.kind == GENERATE else "its head would be a fresh one"
            print(f"note: there is no untouched model to score on {task.name}: {why}")
        for whose in ["base"] * untouched + [folder] * (folder is not None):
            with model.disable_adapter() if whose == "base" and adapted else nullcontext():
                yield str(whose), _score(arguments, task, some, model, tokenizer, labels, how)


def run(arguments: EvalArguments) -> int:
    """Print a line for each task and adapter, and the mean of several."""
    found: list[tuple[str, Score]] = []
    for i, folder in enumerate(arguments.adapter or [None]):
        for whose, each in _scores(arguments, folder, base=arguments.base and i == 0):
            print(f"{whose}: {each.in_words()}", flush=True)
            found.append((whose, each))
    trained = [each for whose, each in found if whose != "base"]
    for task in dict.fromkeys(each.task for each in trained):
        of_task = [each for each in trained if each.task == task]
        if len(of_task) > 1 and of_task[0].metrics:
            means = (
                f"{name} {mean_and_spread([each.metrics[name] for each in of_task])}" for name in of_task[0].metrics
            )
            print(f"{task}, {len(of_task)} adapters: {'   '.join(means)}")
    if arguments.scores is not None:
        kept = ("task", "records", "unparsed")
        lines = [{"of": whose, **{name: getattr(each, name) for name in kept}, **each.metrics} for whose, each in found]
        write_rows(arguments.scores, lines)
    if arguments.predictions is not None:
        rows = [{**row, "generator": whose, "task": each.task} for whose, each in found for row in each.predictions]
        write_rows(arguments.predictions, rows)
    return 0
