"""What a task is, and the tasks by name. A task of your own is one function::

    from fastreft.tasks.sets import Record, register

    @register("capitals", answer_of=last_word)
    def capitals(split, folder):
        for line in open(f"{folder}/{split}.txt"):
            country, capital = line.split()
            yield Record(f"The capital of {country} is", f" {capital}", capital)

which ``fastreft train --task capitals --task_module my_tasks.py`` trains on and ``fastreft eval`` scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest

SPLITS = ("train", "validation", "test")
GENERATE, CLASSIFY, REGRESS, TAG = KINDS = ("generate", "classify", "regress", "tag")
NAMED = (CLASSIFY, TAG)  # the kinds whose model has an output for each label
# The metrics of a task that names none.
USUAL = {
    GENERATE: ("accuracy",),
    CLASSIFY: ("accuracy",),
    REGRESS: ("pearson", "spearman"),
    TAG: ("entity_f1", "token_accuracy"),
}


@dataclass(frozen=True)
class Record:
    """One example.

    ``prompt`` is what the model is given, the task's own words round the question included, or the text to be labelled, with
    ``pair`` beside it where there are two. ``completion`` is what it learns to write. ``answer`` is what counts: the text,
    number or label that a prediction is compared with; None where nothing is scored. ``about`` goes into the predictions'
    file as it is. ``messages``: a conversation in place of prompt and completion. ``words``: those of ``prompt``, which has
    blanks between them, and ``answer`` a tag for each. ``subspaces``: the groups of R's rows that it is for, a name, names
    joined by "+", or a list of names and numbers. ``where`` names the record in errors.
    """

    prompt: str
    completion: str = ""
    answer: Any = None
    pair: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None
    words: tuple[str, ...] | None = None
    subspaces: Any = None
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.words is not None and (self.prompt != " ".join(self.words) or len(self.answer) != len(self.words)):
            raise ValueError("words must be those of prompt, a blank between two, and answer must have a tag for each")

    def by(self, subspaces: Any) -> Record:
        """The same for other subspaces."""
        return replace(self, subspaces=subspaces)


# (split, the folder of --data_dir or None for the hub) -> records; UserError where there are none.
Reader = Callable[[str, "Path | None"], Iterable[Record]]


@dataclass(frozen=True)
class TaskSet:
    """A data set, how it is asked, and how it is scored.

    ``kind``: "generate" text, "classify" into ``labels`` (all those of the training records where empty), "regress" to a
    number, or "tag" words with ``labels``. ``answer_of`` finds the answer in what was written, None where there is none;
    ``same`` compares it with a record's. ``metrics`` are names of :data:`fastreft.tasks.sets.metrics.METRICS`, the first the
    one that counts; a kind's :data:`USUAL` where none are named. ``recited``: what it is trained on is what is asked for.
    """

    name: str
    read: Reader
    kind: str = GENERATE
    answer_of: Callable[[str], Any] = str.strip
    same: Callable[[Any, Any], bool] = lambda found, wanted: found == wanted
    metrics: tuple[str, ...] = ("accuracy",)
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 32
    recited: bool = False

    def records(self, split: str, folder: Path | None) -> list[Record]:
        """All of a split; :class:`UserError` where it is empty."""
        found = list(self.read(split, folder))
        if not found:
            raise UserError(f"the task '{self.name}' has no {split} records in '{folder}'")
        if self.kind != CLASSIFY or self.labels:
            return found
        # Numbered classes are names where no labels are given, of which a number would be a place.
        return [replace(one, answer=str(one.answer)) if isinstance(one.answer, int) else one for one in found]


@dataclass(frozen=True)
class Family:
    """Tasks that are trained on together, and scored one by one. ``read``: training records that are no member's own."""

    name: str
    members: tuple[str, ...]
    read: Reader | None = None


_SETS: dict[str, TaskSet] = {}
_FAMILIES: dict[str, Family] = {}


def register(name: str, **settings: Any) -> Callable[[Reader], Reader]:
    """A decorator that makes a function (split, folder) -> records the task ``name``; ``settings`` are :class:`TaskSet`'s."""

    def add(read: Reader) -> Reader:
        kind = settings.get("kind", GENERATE)
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        _SETS[name] = TaskSet(name, read, **{"metrics": USUAL[kind], **settings})
        return read

    return add


def register_family(name: str, members: Iterable[str], read: Reader | None = None) -> None:
    """Make ``name`` stand for several tasks."""
    _FAMILIES[name] = Family(name, tuple(members), read)


def families() -> dict[str, tuple[str, ...]]:
    """Every family and its members."""
    return {name: family.members for name, family in _FAMILIES.items()}


def names() -> list[str]:
    """Every task and family."""
    return [*_FAMILIES, *_SETS]


def find(name: str) -> list[TaskSet]:
    """The tasks that a name stands for, whatever its capitals; :class:`UserError` where there is none."""
    known = {key.lower(): key for key in names()}
    key = known.get(name.lower())
    if key is None:
        raise UserError(f"there is no task '{name}'{nearest(name, names())}; there are {', '.join(names())}")
    return [_SETS[member] for member in _FAMILIES[key].members] if key in _FAMILIES else [_SETS[key]]


def training_records(name: str, folder: Path | None) -> tuple[list[Record], int]:
    """(what a task or family is trained on, how many records were left out as they are among the test's).

    Published training files hold some of the test questions; whoever trains on those measures memory.
    """
    sets = find(name)
    family = next((found for key, found in _FAMILIES.items() if key.lower() == name.lower()), None)
    if family is not None and family.read is not None:
        records = list(family.read("train", folder))
    else:
        records = [record for each in sets for record in each.records("train", folder)]
    tested = set(_tested(sets, folder))
    kept = [record for record in records if (record.prompt, record.pair) not in tested]
    if not kept:
        raise UserError(f"the task '{name}' has no training records in '{folder}'")
    return kept, len(records) - len(kept)


def _tested(sets: Iterable[TaskSet], folder: Path | None) -> Iterator[tuple[str, str | None]]:
    for each in sets:
        if each.kind == GENERATE and not each.recited:
            try:
                yield from ((record.prompt, record.pair) for record in each.read("test", folder))
            except UserError:
                continue  # a test set that is not there holds nothing
