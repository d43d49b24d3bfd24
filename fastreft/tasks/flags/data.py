"""The flags that say what records a command reads, shared by those that train and those that score."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError

TOO_LONG = ("error", "drop", "cut")
# Where a file of the user's holds what, of records to write and of labelled ones.
WRITTEN = ("prompt_field", "completion_field", "messages_field", "subspaces_field")
LABELLED = ("text_field", "pair_field", "label_field")
FIELDS = (*WRITTEN, *LABELLED)


@dataclass
class DataArguments:
    """What to train on: a task by its name, or a file of records."""

    task: str | None = field(
        default=None,
        metadata={
            "help": "a task or family of tasks, such as boolq, commonsense, gsm8k, arithmetic, alpaca, sst2, banking77; "
            "'fastreft info --tasks' lists them"
        },
    )
    task_module: str | None = field(
        default=None, metadata={"help": "a Python file of yours that registers tasks, or edits; it is run"}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "the folder with the task's files; they come from the hub where not given"}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "records to train on in place of a task: .jsonl, .json, .csv or .tsv"}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "records like those of train_file, to report the loss on"}
    )
    prompt_field: str = field(default="prompt", metadata={"help": "the field that holds the prompt"})
    completion_field: str = field(default="completion", metadata={"help": "the field that holds the completion"})
    messages_field: str | None = field(
        default=None,
        metadata={
            "help": "a field that holds a list of {role, content} messages, the last the assistant's, instead of prompt"
            " and completion; goes through the tokenizer's chat template"
        },
    )
    subspaces_field: str | None = field(
        default=None,
        metadata={
            "help": "the field that holds which of the adapter's subspaces a record is for: names joined by '+', or a list; "
            "of records to write, not of labelled ones"
        },
    )
    text_field: str | None = field(
        default=None,
        metadata={
            "help": "the field that holds a text to be classified, or a list of words to be tagged; in a file of columns "
            "(.conll) the number of one, 1 for the first, -1 for the last"
        },
    )
    pair_field: str | None = field(default=None, metadata={"help": "the field that holds a second text, of pairs"})
    label_field: str | None = field(
        default=None,
        metadata={
            "help": "the field, or the column, that holds the label, or the tags of the words; makes the model a classifier, "
            "or a tagger"
        },
    )
    chat: bool = field(
        default=False, metadata={"help": "put prompt and completion through the chat template as two messages"}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "most tokens of prompt and completion together; 512 or the model's context where not given"},
    )
    too_long: str = field(
        default="error",
        metadata={
            "help": "what to do about a longer one: 'error' cuts completions and refuses a prompt that leaves no room for "
            "one, 'drop' leaves such records out, 'cut' cuts the prompt's beginning away, too",
            "choices": list(TOO_LONG),
        },
    )
    completion_tokens: int | None = field(
        default=None,
        metadata={"help": "learn the first so many tokens of each completion alone, as BREP does with --positions dN"},
    )
    max_train_records: int | None = field(default=None, metadata={"help": "train on the first so many records alone"})
    max_eval_records: int | None = field(
        default=None, metadata={"help": "score, or evaluate on, the first so many records alone"}
    )
    hold_out: int = field(
        default=0,
        metadata={
            "help": "keep the last so many training records (of a file of labelled texts: after mixing) to evaluate on during "
            "training"
        },
    )

    def fields_given(self) -> list[str]:
        """Which fields of a file the user has named."""
        return [name for name in FIELDS if getattr(self, name) != type(self).__dataclass_fields__[name].default]

    def _check_fields(self) -> None:
        """:class:`UserError` for a field that nobody would read."""
        given = self.fields_given()
        if (self.text_field is None) is not (self.label_field is None):
            raise UserError("text_field and label_field go together: the text, and what it is to be classified as")
        if self.subspaces_field is not None and (self.label_field is not None or self.task):
            raise UserError(
                "subspaces_field is of a file of prompts and completions; a task says its own: leave it out"
            )
        if self.task and not self.eval_file and given:
            raise UserError(f"{given[0]} is a field of records of your own, and a task has its own: leave it out")
        if self.label_field is None and self.pair_field is not None:
            raise UserError("pair_field is a second text beside text_field; give text_field and label_field, too")
        written = [*(name for name in given if name in WRITTEN), *(("chat",) if self.chat else ())]
        if self.label_field is not None and written:
            raise UserError(
                f"{written[0]} is of records to write, and label_field of labelled ones; leave one of them out"
            )
        if self.messages_field is not None and (both := [*{*given} & {"prompt_field", "completion_field"}]):
            raise UserError(f"messages_field and {min(both)} each say what a record is; leave one of them out")

    def check(self, *, training: bool = True) -> None:
        """:class:`UserError` for what does not go together, and for files that are not there."""
        if training and (self.task is None) is (self.train_file is None):
            raise UserError("give either --task or --train_file: what to train on")
        self._check_fields()
        if self.too_long not in TOO_LONG:
            raise UserError(f"too_long is {self.too_long!r}; it must be one of {', '.join(TOO_LONG)}")
        for name in ("completion_tokens", "max_train_records", "max_eval_records"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.hold_out < 0:
            raise UserError(f"hold_out is {self.hold_out}; it must be at least 0")
        if self.eval_file and self.hold_out:
            raise UserError("eval_file and hold_out each say what to evaluate on; give one of them")
        for file in filter(None, (self.train_file, self.eval_file, self.task_module)):
            if not Path(file).expanduser().exists():
                raise UserError(f"cannot read the data file '{file}': No such file or directory")
        if self.data_dir is not None and not Path(self.data_dir).expanduser().is_dir():
            raise UserError(f"there is no data folder '{self.data_dir}'")
