"""``fastreft tune``: a search for a training's best settings, with optuna through Transformers' Trainer.

The study is a file in output_dir and goes on where it was stopped. Every trial starts from the base model and the same seed.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from ..files import check_writable, staged
from . import methods
from .errors import UserError, user_errors
from .flags.train import AUTO, parser_of
from .flags.tune import FACTOR, SCALES, Dimension, TuneArguments, dimensions, meant
from .run_log import write_rows
from .sets.registry import GENERATE
from .train import Prepared, Settings, TaskTrainer, data_notes, make_model, prepare, settings, trainer_settings

STUDY, BEST, TRIALS, PLOT = "study.sqlite", "best.yaml", "trials.jsonl", "trials.png"
SETTINGS, FAILED = "settings", "failed"  # what a study is of; why a trial was none


class _Search(TaskTrainer):
    """Trainer, with a trial's settings, model and optimizer made anew for each trial."""

    def __init__(self, given: Settings, ready: Prepared, space: Sequence[Dimension]):
        self.given, self.ready, self.space = given, ready, space
        self.rate_given = given.training.learning_rate
        super().__init__(given, model_init=self.fresh_model, **trainer_settings(given, ready))

    def fresh_model(self, trial: Any = None) -> Any:
        """The model as a trial has it, its rate in the arguments."""
        self.mine, factor = of_trial(self.given, self.space, trial)
        training = self.given.training
        if not any(each.name == "learning_rate" for each in self.space):
            training.learning_rate = self.rate_given
        try:
            model = make_model(self.mine, self.ready)
        except UserError as error:  # values that do not go together: of this trial's own, or of every one's
            if trial is not None:
                trial.set_user_attr(FAILED, str(error))
            raise
        training.learning_rate = factor * training.learning_rate
        if trial is not None:
            trial.set_user_attr("learning_rate", training.learning_rate)
            if self.mine.method.head_lr_scale is not None:  # given, or found with the rate
                trial.set_user_attr("head_lr_scale", self.mine.method.head_lr_scale)
            trial.set_user_attr("trained_numbers", methods.counts(model)[0])
        return model


def of_trial(run: Settings, space: Sequence[Dimension], trial: Any) -> tuple[Settings, float]:
    """(the settings of a trial, what its model's own rate is multiplied with)."""
    chosen = {each.name: each.suggest(trial) for each in space} if trial is not None else {}
    adapter = {name: chosen.get(name, value) for name, value in run.adapter.items()}
    method = dataclasses.replace(run.method, **{name: chosen[name] for name in SCALES if name in chosen})
    for name, value in chosen.items():
        if name not in adapter and hasattr(run.training, name):
            setattr(run.training, name, value)
    return run._replace(adapter=adapter, method=method), chosen.get(FACTOR, 1.0)


def _study(optuna: Any, folder: Path, direction: str, of: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the study in a folder, new or gone on with, what Trainer needs to find it); what was cut off counts as failed.

    :class:`UserError` where the one that is there is ``of`` other settings.
    """
    found = {"storage": f"sqlite:///{folder / STUDY}", "study_name": "fastreft", "load_if_exists": True}
    study = optuna.create_study(direction=direction, **found)
    before = study.user_attrs.get(SETTINGS, of if not study.trials else None)
    if before != of:
        other = [name for name in {**of, **(before or {})} if before is None or before.get(name) != of.get(name)]
        raise UserError(
            f"output_dir '{folder}' has a study of other settings ({', '.join(other)}); give the same ones to go on with "
            "it, or another folder"
        )
    study.set_user_attr(SETTINGS, of)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study, {
        **found,
        # A sampler keeps nothing: of one seed it would draw the first trials again wherever a study goes on.
        "sampler": optuna.samplers.TPESampler(seed=len(study.trials)),
        "pruner": optuna.pruners.MedianPruner(n_startup_trials=5),
    }


def run(flags: Sequence[str]) -> int:
    """Search, report, and write the best settings as a file that ``fastreft train --config`` takes."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("tune needs optuna: pip install 'fastreft[tune]'") from error
    run = settings(flags, TuneArguments)
    (arguments,) = run.more
    space = dimensions(arguments, TrainingArguments, run.method.method)
    folder = Path(str(run.training.output_dir))
    with user_errors(OSError, prefix=f"cannot write into output_dir '{folder}': "):
        check_writable(str(folder))
    ready = prepare(run)
    if ready.evaluated is None or ready.data.evaluated_on_test:
        raise UserError("a search needs records of its own to choose by; give --hold_out N or --eval_file")
    objective = "eval_loss" if ready.data.kind == GENERATE else f"eval_{ready.data.metrics[0]}"
    direction = "minimize" if objective == "eval_loss" else "maximize"
    run.training.save_strategy = "no"
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a trial that fails is told of below
    of = {name: value for name, value in _given(flags).items() if name != "output_dir"}
    for note in data_notes(ready):
        print(f"note: {note}")
    study, found = _study(optuna, folder, direction, {**of, "search": [str(each) for each in space]})
    done = sum(trial.state.is_finished() and trial.state.name != "FAIL" for trial in study.trials)
    if done < arguments.trials:
        with user_errors(ValueError, RuntimeError, ImportError):
            _Search(run, ready, space).hyperparameter_search(
                hp_space=lambda trial: {},
                compute_objective=lambda metrics: metrics[objective],
                n_trials=arguments.trials - done,
                direction=direction,
                backend="optuna",
                timeout=arguments.timeout,
                catch=(FloatingPointError, UserError),  # a rate too high, and settings that do not go together
                **found,
            )
    return _report(optuna, study, flags, folder, objective)


def _report(optuna: Any, study: Any, flags: Sequence[str], folder: Path, objective: str) -> int:
    """A table, best first; the trials, the best settings and a picture as files."""
    finished = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    reasons = {trial.user_attrs[FAILED] for trial in study.trials if FAILED in trial.user_attrs}
    if not finished:
        raise UserError(f"no trial came to its end; {'; '.join(sorted(reasons)) or 'give more time, or lower rates'}")
    for reason in sorted(reasons):
        print(f"note: trials failed: {reason}")
    finished.sort(key=lambda trial: trial.value, reverse=study.direction.name == "MAXIMIZE")
    rows = [
        {"trial": t.number, "state": t.state.name.lower(), objective: t.value, **t.params, **t.user_attrs}
        for t in (*finished, *(t for t in study.trials if t.state.name != "COMPLETE"))
    ]
    for row in rows[:20]:
        print(
            "   ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )
    write_rows(str(folder / TRIALS), rows)
    best = {**_given(flags), **{name: meant(value) for name, value in finished[0].params.items() if name != FACTOR}}
    found = ("learning_rate", "head_lr_scale")
    best |= {name: finished[0].user_attrs[name] for name in found if name in finished[0].user_attrs}
    best["output_dir"] = str(folder / "best")
    with staged(folder, last=BEST) as staging:
        (staging / BEST).write_text(yaml.safe_dump(best, sort_keys=False), encoding="utf-8")
    print(
        f"{len(finished)} of {len(study.trials)} trials came to their end; the best: fastreft train --config {folder / BEST}"
    )
    try:
        import matplotlib

        matplotlib.use("Agg")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental, and that one value is no range
            axes = optuna.visualization.matplotlib.plot_slice(study)
        figure = axes.flat[0].figure if hasattr(axes, "flat") else axes.figure
        figure.savefig(folder / PLOT, dpi=110)
    except ImportError:
        print("note: no picture of the trials, as there is no matplotlib")
    return 0


def _given(flags: Sequence[str]) -> dict[str, Any]:
    """The settings of a training that the flags give, and not its defaults."""
    parser = parser_of(TrainingArguments, TuneArguments)
    chosen = vars(parser.parse_known_args(list(flags))[0])
    own = {field.name for field in dataclasses.fields(TuneArguments)} | {"config"}
    plain = (str, int, float, bool, list, type(None))
    return {
        name: getattr(value, "value", value)
        for name, value in chosen.items()
        if name not in own and value != parser.get_default(name) and value is not AUTO and isinstance(value, plain)
    }
