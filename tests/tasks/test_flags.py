"""The command line before anything heavy is imported: what it costs in modules, and the stand-in for Transformers' flags."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import forked
import pytest
from transformers import TrainingArguments

from fastreft import settings
from fastreft.cli import COMMANDS
from fastreft.tasks.flags import train, training
from fastreft.tasks.sets import find

HEAVY = {"torch", "peft", "datasets", "transformers.training_args", "safetensors"}
TRAIN = ["train", "--model", "embedded", "--train_file", sys.executable, "--output_dir", "nowhere"]


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--help"], 0, "commands:"),
        *[([command, "--help"], 0, "usage: fastreft") for command in COMMANDS],
        (["train", "--modle", "x"], 2, "required"),
        ([*TRAIN, "--lerning_rate", "1"], 2, "did you mean '--learning_rate'?"),
        ([*TRAIN, "--learning_rate", "fast"], 2, "'fast' is neither a number nor 'auto'"),
        ([*TRAIN, "--eval_strategy", "sometimes"], 2, "invalid choice: 'sometimes'"),
        ([*TRAIN, "--log_level", "loud"], 2, "invalid choice: 'loud'"),
        ([*TRAIN, "--positions", "f0"], 2, "positions is 'f0'"),
        ([*TRAIN, "--act_fn", "geluu"], 2, "act_fn 'geluu'"),
        ([*TRAIN, "--r", "0"], 2, "r is 0"),
        ([*TRAIN, "--eval_file", "/no/such/file"], 2, "cannot read the data file '/no/such/file'"),
        (["train", "--config", "/no/such.yaml"], 2, "cannot read the config file"),
        (["generate", "--adapter", "/no/such", "--prompt", "x"], 2, "there is no adapter in '/no/such'"),
        (["convert", "--source", "/no", "--output_dir", "/no", "--positions", "x1"], 2, "positions is 'x1'"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
def test_help_and_what_is_wrong_come_before_anything_heavy(argv, code, said):
    script = (
        "import sys, json; from fastreft.cli import main\n"
        "try: code = main(json.loads(sys.argv[1]))\n"
        "except SystemExit as stop: code = stop.code\n"
        f"print('LOADED', sorted({HEAVY!r} & set(sys.modules)), 'CODE', code)"
    )
    done = forked.run(script, json.dumps(argv), held=("fastreft.cli", "transformers"))  # neither of which is heavy
    assert done.returncode == 0, done.stderr
    assert f"LOADED [] CODE {code}" in done.stdout
    assert said in done.stdout + done.stderr


def described(training_class):
    """What the parser of a run shows and takes, flag by flag; a default or a type that only the real class knows left out."""
    flags = {}
    for action in train.parser_of(training_class)._actions:
        choices = None if action.choices is None else [str(choice) for choice in action.choices]
        default = action.default
        kind = action.type.__name__ if action.type in (int, float, str, dict) else None
        flags[(action.dest, *action.option_strings)] = [
            action.nargs, action.const, choices, action.required, action.help, default, kind
        ]  # fmt: skip
    return flags


def test_the_stand_in_has_the_flags_of_the_real_one():
    assert training.training_arguments() is not TrainingArguments
    ours, theirs = described(training.training_arguments()), described(TrainingArguments)
    assert list(ours) == list(theirs) and len(ours) > 100
    left = []
    for name, wanted in theirs.items():
        given = ours[name]
        if isinstance(given[5], training.LeftToTransformers):
            left.append(name[0])
            given = [*given[:5], *wanted[5:]]
        if name[0] == "parallelism_config":  # a class of its own, which no flag can give
            given = [*given[:6], wanted[6]]
        assert given == wanted, name
    assert left == ["optim"]


@pytest.mark.parametrize(
    "odd", ["", "class TrainingArguments: pass", "class TrainingArguments:\n  x: int = field(default=y.z())"]
)
def test_a_source_that_is_odd_gives_the_real_one(odd, monkeypatch):
    monkeypatch.setattr(training, "tree_of", lambda *_: ast.parse(odd))
    assert training.training_arguments() is TrainingArguments


@pytest.mark.parametrize("odd", [True, False])
def test_activations_that_no_kernel_has_are_known_with_and_without_their_source(odd, monkeypatch):
    if odd:
        monkeypatch.setattr(settings, "tree_of", lambda *_: ast.parse(""))
    monkeypatch.delitem(sys.modules, "transformers.activations", raising=False)
    assert "prelu" in settings.activation_names() and "geluu" not in settings.activation_names()
    assert ("transformers.activations" in sys.modules) == odd


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_papers_settings_are_settings(path, tmp_path):
    flags = train.parse(["--config", str(path), "--data_dir", str(tmp_path)])
    _, data, _, adapter, training_settings = train.parser_of(training.training_arguments()).parse(flags)
    assert find(data.task) and adapter.init_weights == "random" and 1e-4 <= training_settings.learning_rate <= 5e-3
