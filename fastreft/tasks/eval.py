"""``fastreft eval``: what adapters, and the untouched model, score on a task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

import fastreft  # noqa: F401  # registers the method with PEFT

from .errors import UserError
from .flags.eval import EvalArguments
from .models import adapter_config, class_for, head_settings, load_adapter, load_base, load_config, load_tokenizer
from .places import ADAPTER_CONFIG
from .records import tasks_of, to_score
from .run_log import read_log, write_rows
from .scoring import Score, mean_and_spread, score
from .sets.registry import GENERATE, NAMED


def _is_adapter(folder: str) -> bool:
    return (Path(folder).expanduser() / ADAPTER_CONFIG).is_file()


def _base_of(arguments: EvalArguments, folder: str | None) -> str:
    """The model that a folder's adapter is for; the folder itself where all of a model was trained."""
    if folder is not None and not _is_adapter(folder):
        return folder
    named = arguments.model or (adapter_config(folder).base_model_name_or_path if folder is not None else None)
    if not named:
        raise UserError(f"the adapter in '{folder}' names no base model; give --model")
    return named


def _scores(arguments: EvalArguments, folder: str | None, base: bool) -> Iterator[tuple[str, Score]]:
    """(whose, score) of each task for one adapter and, with ``base``, of the model under it."""
    log = read_log(folder) if folder is not None else {}
    name = arguments.task or log.get("task")
    if not name:
        raise UserError(f"'{folder}' does not say what it was trained on; give --task")
    sets = tasks_of(arguments.data(name))
    labels = tuple(log.get("labels") or sets[0].labels)
    if sets[0].kind in NAMED and not labels:
        raise UserError(
            f"the labels of '{name}' are those of a training; score what 'fastreft train --task {name}' wrote"
        )
    named, trusts = _base_of(arguments, folder), arguments.trust_remote_code
    tokenizer = load_tokenizer(named, folder, trusts, writes=sets[0].kind == GENERATE)
    kind, _ = class_for(sets[0].kind, load_config(named, trusts))
    dtype = arguments.dtype if arguments.dtype != "auto" else str(log.get("dtype", "auto"))
    model = load_base(named, dtype, trusts, kind=kind, **head_settings(sets[0].kind, labels, tokenizer))
    adapted = folder is not None and _is_adapter(folder)
    if adapted:
        model = load_adapter(model, str(folder))
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    for task in sets:
        records = to_score(task, arguments.data(name), arguments.split)
        # The base of a classifier is a fresh head, whose score is nobody's.
        untouched = base and task.kind == GENERATE and (adapted or folder is None)
        for whose in ["base"] * untouched + [folder] * (folder is not None):
            with model.disable_adapter() if whose == "base" and adapted else nullcontext():
                yield (
                    str(whose),
                    score(
                        task,
                        records,
                        model,
                        tokenizer,
                        labels=labels,
                        chat=bool(log.get("chat")),
                        batch_size=arguments.batch_size,
                        max_length=int(log.get("max_length") or 512),
                    ),
                )


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
    if arguments.predictions is not None:
        rows = [{**row, "generator": whose, "task": each.task} for whose, each in found for row in each.predictions]
        write_rows(arguments.predictions, rows)
    return 0
