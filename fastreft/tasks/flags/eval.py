"""The flags of ``fastreft eval``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from ..errors import UserError, user_errors
from ..modules import run_module
from ..places import find_model, find_trained
from ..sets.answers import EXTRACTS, extractor
from ..sets.registry import SPLITS
from .data import FIELDS, DataArguments
from .parser import Parser, check_rows_file, same_flag

_of_training = partial(same_flag, DataArguments)


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
    task_module: str | None = _of_training("task_module")
    data_dir: str | None = _of_training("data_dir")
    split: str = field(default="test", metadata={"help": "train, validation or test"})
    eval_file: str | None = field(
        default=None,
        metadata={
            "help": "records of your own in place of a task: .jsonl, .json, .csv or .tsv. Of completions: how many are written "
            "word for word, and the mean loss of a token; of labelled texts: accuracy"
        },
    )
    prompt_field: str = _of_training("prompt_field")
    completion_field: str = _of_training("completion_field")
    messages_field: str | None = _of_training("messages_field")
    subspaces_field: str | None = _of_training("subspaces_field")
    text_field: str | None = _of_training("text_field")
    pair_field: str | None = _of_training("pair_field")
    label_field: str | None = _of_training("label_field")
    chat: bool = field(
        default=False, metadata={"help": "put prompts through the chat template; an adapter says so itself"}
    )
    too_long: str = _of_training("too_long")
    answer_field: str | None = field(
        default=None,
        metadata={
            "help": "the field of eval_file that holds the right answer, which --extract finds in what is written"
        },
    )
    extract: str = field(
        default="text",
        metadata={
            "help": f"what of a text is its answer: {EXTRACTS}; 'number' is the last one, 'a|b|c' the first of these words"
        },
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "most tokens to write; as many as the task has or the longest completion where not given"},
    )
    max_eval_records: int | None = _of_training("max_eval_records")
    batch_size: int = field(default=8, metadata={"help": "records at a time"})
    predictions: str | None = field(
        default=None,
        metadata={"help": "a file for the predictions: .jsonl, a line each; .json, a list as AlpacaEval reads it"},
    )
    scores: str | None = field(
        default=None,
        metadata={"help": "a file for the scores: .jsonl, a line for each task and adapter; .json, a list"},
    )
    dtype: str = field(default="auto", metadata={"help": "the base model's dtype, or 'auto' for its checkpoint's"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code of the model's own folder"})

    def data(self, task: str | None) -> DataArguments:
        """The same as the flags of a training."""
        same = ("task_module", "data_dir", "eval_file", "max_eval_records", "chat", "too_long", *FIELDS)
        return DataArguments(task=task, **{name: getattr(self, name) for name in same})

    def check_file(self) -> None:
        """:class:`UserError` for what does not go with a file of one's own, or without one."""
        if self.eval_file is None:
            for name in self.data(self.task).fields_given():
                raise UserError(f"{name} is a field of records of your own; give them with --eval_file")
            if self.answer_field is not None:
                raise UserError("answer_field is a field of records of your own; give them with --eval_file")
            return
        if self.answer_field is not None and (self.label_field or self.messages_field):
            raise UserError("answer_field is of prompts; leave label_field and messages_field out")
        for name, unset in (("task", None), ("data_dir", None), ("split", "test")):
            if getattr(self, name) != unset:
                raise UserError(f"{name} is of a task, and eval_file gives records of your own: leave one of them out")


def parse(argv: Sequence[str]) -> EvalArguments:
    """:class:`UserError` for what is wrong."""
    parser = Parser(
        [EvalArguments],
        command="fastreft eval",
        description="Score adapters, and the untouched model, on a task or on records of your own.",
    )
    (arguments,) = parser.parse(argv)
    on = arguments.task or arguments.eval_file
    if not arguments.adapter and not (arguments.base and arguments.model and on):
        raise UserError(
            "there is nothing to score: give --adapter FOLDER, or --base with --model and --task or --eval_file"
        )
    arguments.check_file()
    for folder in arguments.adapter or ():
        find_trained(folder)
    if arguments.model is not None:
        find_model(arguments.model)
    if arguments.split not in SPLITS:
        raise UserError(f"split is {arguments.split!r}; it must be one of {', '.join(SPLITS)}")
    if arguments.batch_size < 1:
        raise UserError(f"batch_size is {arguments.batch_size}; it must be at least 1")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {arguments.max_new_tokens}; it must be at least 1")
    with user_errors(ValueError):
        extractor(arguments.extract)
    if arguments.extract != "text" and arguments.answer_field is None:
        raise UserError("extract finds the answer that --answer_field names; give that, too")
    check_rows_file("predictions", arguments.predictions)
    check_rows_file("scores", arguments.scores)
    arguments.data("").check(training=False)
    if arguments.task_module is not None:
        run_module(arguments.task_module)  # as it may register the adapter's edit
    return arguments
