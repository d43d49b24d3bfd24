"""The flags of ``fastreft tune``: those of a training, and what is searched."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ...settings import ReftSettings
from ..errors import UserError, nearest
from . import train
from .training import training_arguments

SCALES = ("r_lr_scale", "head_lr_scale")
FACTOR = "rate_factor"  # of the rate that suits a trial's model
SPACE = (
    f"{FACTOR}=0.25:4:log", "r=1,2,4,8", "positions=f3,f5+l5,f7+l7,all", "layers_to_transform=all,::2", "tied=false,true",
    "dropout=0,0.05", "warmup_steps=0,0.1",
)  # fmt: skip


@dataclass
class TuneArguments:
    """What is searched, and for how long."""

    trials: int = field(
        default=20, metadata={"help": "trials in all, those of an earlier run of the same study included"}
    )
    timeout: float | None = field(default=None, metadata={"help": "seconds after which no further trial begins"})
    search: list[str] | None = field(
        default=None,
        metadata={
            "help": "settings and their values: name=a,b,c or name=low:high or name=low:high:log; "
            f"rate_factor multiplies the rate that suits each trial's model. {' '.join(SPACE)} if not given"
        },
    )


@dataclass(frozen=True)
class Dimension:
    """A setting that is searched: among ``values``, or from ``low`` to ``high``."""

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    def suggest(self, trial: Any) -> Any:
        """This trial's value; the same however often it is asked."""
        if self.values:
            return meant(trial.suggest_categorical(self.name, list(self.values)))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.name, self.low, self.high, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)


def meant(value: Any) -> Any:
    """A value as a setting takes it: a list is written as text, as a study keeps no lists."""
    return json.loads(value) if isinstance(value, str) and _LIST.fullmatch(value) else value


_LIST = re.compile(r"\[\d+(,\d+)*\]")


def _plain(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def dimension(text: str, known: set[str]) -> Dimension:
    """What ``name=...`` searches; :class:`UserError` where it is not to be understood."""
    name, given, values = text.partition("=")
    if name not in known:
        raise UserError(f"search is '{text}', and there is no setting '{name}'{nearest(name, known)}")
    if not given or not values:
        raise UserError(f"search is '{text}'; it must be name=a,b,c or name=low:high or name=low:high:log")
    parts = values.split(":")
    bounds = [_plain(part) for part in parts[:2]]
    slices = name == "layers_to_transform"  # whose 1:4 is one value, the layers 1 to 3
    if (
        not slices
        and len(parts) in (2, 3)
        and all(isinstance(b, (int, float)) and not isinstance(b, bool) for b in bounds)
    ):
        low, high = bounds
        if not low < high or parts[2:] not in ([], ["log"]) or (parts[2:] and low <= 0):
            raise UserError(f"search is '{text}'; low must be below high, and above 0 for log")
        return Dimension(name, low=low, high=high, log=bool(parts[2:]))
    return Dimension(name, tuple(_plain(value) for value in re.findall(r"\[[^\]]*\]|[^,]+", values)))


def dimensions(arguments: TuneArguments, training: type, method: str) -> list[Dimension]:
    """All that is searched; if nothing is named, what there is of :data:`SPACE` for ``method``."""
    of_reft, of_all = ({f.name for f in fields(kind)} for kind in (ReftSettings, training))
    found = [dimension(text, {FACTOR, *SCALES, *of_reft, *of_all}) for text in arguments.search or SPACE]
    if method != "reft" and (none := [each.name for each in found if each.name in of_reft | {"r_lr_scale"}]):
        if arguments.search:
            raise UserError(f"search names {none[0]}, which is a ReFT adapter's, and method is '{method}'")
        found = [each for each in found if each.name not in none]
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise UserError(f"search names {next(n for n in names if names.count(n) > 1)} twice")
    if {FACTOR, "learning_rate"} <= {*names}:
        raise UserError(f"search has both learning_rate and {FACTOR}; give one of them")
    return found


def parse(argv: Sequence[str]) -> list[str]:
    """The flags of a search, those of a YAML file first; :class:`UserError` for any that is wrong."""
    flags, (arguments,), method = train.checked(
        argv, "fastreft tune", "Search for a training's best settings.", TuneArguments
    )
    if arguments.trials < 1:
        raise UserError(f"trials is {arguments.trials}; it must be at least 1")
    if arguments.timeout is not None and not 0 < arguments.timeout < float("inf"):
        raise UserError(f"timeout is {arguments.timeout}; it must be above 0, and finite")
    dimensions(arguments, training_arguments(), method)
    return flags
