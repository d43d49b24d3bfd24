"""The flags of ``fastreft eval``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..places import MODEL_CONFIG, find_adapter, find_model
from ..sets.registry import SPLITS
from .data import DataArguments
from .parser import Parser, check_rows_file


@dataclass
class EvalArguments:
    """What to score, on what."""

    adapter: list[str] | None = field(
        default=None,
        metadata={"help": "folders that 'fastreft train' wrote; several, of several seeds, are also averaged"},
    )
    model: str | None = field(
        default=None, metadata={"help": "the base model; the one that the adapter names if not given"}
    )
    base: bool = field(
        default=False, metadata={"help": "score the untouched model, too; alone where no adapter is given"}
    )
    task: str | None = field(
        default=None,
        metadata={"help": "a task or family of tasks; the one that the adapter was trained on if not given"},
    )
    task_module: str | None = field(
        default=None, metadata={"help": "a Python file of yours that registers tasks; it is run"}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "the folder with the task's files; they come from the hub where not given"}
    )
    split: str = field(default="test", metadata={"help": "train, validation or test"})
    max_eval_records: int | None = field(default=None, metadata={"help": "score the first so many records alone"})
    batch_size: int = field(default=8, metadata={"help": "records at a time"})
    predictions: str | None = field(
        default=None,
        metadata={"help": "a file for the predictions: .jsonl, a line each; .json, a list as AlpacaEval reads it"},
    )
    dtype: str = field(default="auto", metadata={"help": "the base model's dtype, or 'auto' for its checkpoint's"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code of the model's own folder"})

    def data(self, task: str) -> DataArguments:
        """The same as the flags of a training."""
        return DataArguments(
            task=task, task_module=self.task_module, data_dir=self.data_dir, max_eval_records=self.max_eval_records
        )


def parse(argv: Sequence[str]) -> EvalArguments:
    """:class:`UserError` for what is wrong."""
    parser = Parser(
        [EvalArguments], command="fastreft eval", description="Score adapters, and the untouched model, on a task."
    )
    (arguments,) = parser.parse(argv)
    if not arguments.adapter and not (arguments.base and arguments.model and arguments.task):
        raise UserError("there is nothing to score: give --adapter FOLDER, or --base with --model and --task")
    for folder in arguments.adapter or ():
        if not folder or not (Path(folder).expanduser() / MODEL_CONFIG).is_file():
            find_adapter(folder)
    if arguments.model is not None:
        find_model(arguments.model)
    if arguments.split not in SPLITS:
        raise UserError(f"split is {arguments.split!r}; it must be one of {', '.join(SPLITS)}")
    if arguments.batch_size < 1:
        raise UserError(f"batch_size is {arguments.batch_size}; it must be at least 1")
    check_rows_file("predictions", arguments.predictions)
    arguments.data("").check(training=False)
    return arguments
