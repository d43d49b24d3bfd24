"""The search for settings: its space, a study that is killed and goes on, and the file that it ends in."""

from __future__ import annotations

import json

import pytest
import yaml
from shell import fails
from tiny import save_bert
from trained import write_records

from fastreft.cli import main
from fastreft.tasks.errors import UserError
from fastreft.tasks.flags.training import training_arguments
from fastreft.tasks.flags.tune import Dimension, TuneArguments, dimension, dimensions, meant
from fastreft.tasks.run_log import read_log

pytest.importorskip("optuna")
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"]


@pytest.fixture
def search(tmp_path):
    data = tmp_path / "train.jsonl"
    write_records(data)
    return [
        *("tune", "--model", "embedded", "--train_file", str(data), "--hold_out", "4", "--max_steps", "2"),
        *(
            "--output_dir",
            str(tmp_path / "out"),
            *QUICK,
            "--search",
            "rate_factor=0.5:2:log",
            "r=1,2",
            "positions=f1,all",
        ),
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("r=1,2,4", Dimension("r", (1, 2, 4))),
        ("positions=f3,all", Dimension("positions", ("f3", "all"))),
        ("tied=true,false,position", Dimension("tied", (True, False, "position"))),
        ("r=1:8", Dimension("r", low=1, high=8)),
        ("rate=1e-4:1e-1:log", Dimension("rate", low=1e-4, high=1e-1, log=True)),
        ("layers_to_transform=0:4,::2", Dimension("layers_to_transform", ("0:4", "::2"))),
        ("layers_to_transform=1:4", Dimension("layers_to_transform", ("1:4",))),
        ("layers_to_transform=[0,2],all,3", Dimension("layers_to_transform", ("[0,2]", "all", 3))),
    ],
)
def test_what_is_searched(text, wanted):
    assert dimension(text, {"r", "positions", "tied", "rate", "layers_to_transform"}) == wanted


def test_a_list_among_the_values():
    assert [meant(value) for value in ("[0,2]", "all", 3, "::2")] == [[0, 2], "all", 3, "::2"]


def test_another_method_has_a_space_of_its_own():
    names = [each.name for each in dimensions(TuneArguments(), training_arguments(), "lora")]
    assert names == ["rate_factor", "warmup_steps"]
    assert len(dimensions(TuneArguments(), training_arguments(), "reft")) == 7


@pytest.mark.parametrize("text", ["r", "r=", "q=1,2", "r=2:1", "r=1:2:lin", "r=0:2:log"])
def test_what_is_not(text):
    with pytest.raises(UserError, match="search is"):
        dimension(text, {"r"})


def trials_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]


def test_a_study_goes_on_and_its_best_can_be_trained(search, tmp_path, capsys):
    search = [*search, "--max_length", "8", "--too_long", "cut"]
    assert main([*search, "--trials", "2"]) == 0
    first = trials_of(tmp_path)
    assert len(first) == 2 and all(row["state"] == "complete" for row in first)
    assert main([*search, "--trials", "4"]) == 0  # two more
    said, rows = capsys.readouterr().out, trials_of(tmp_path)
    assert len(rows) == 4 and "4 of 4 trials" in said
    assert said.count("training records were cut at max_length = 8 tokens") == 2  # once each time
    assert sorted(row["trial"] for row in rows) == [0, 1, 2, 3]
    assert {row["trial"]: row["eval_loss"] for row in first}.items() <= {
        row["trial"]: row["eval_loss"] for row in rows
    }.items()
    best = min(rows, key=lambda row: row["eval_loss"])
    settings = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert settings["r"] == best["r"] and settings["positions"] == best["positions"]
    assert settings["learning_rate"] == best["learning_rate"]
    assert main(["train", "--config", str(tmp_path / "out" / "best.yaml"), "--save_strategy", "no"]) == 0
    log = read_log(tmp_path / "out" / "best")
    assert log["evaluation"]["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)  # the trial, again


def test_a_study_that_was_killed_goes_on(search, tmp_path, capsys, monkeypatch):
    real, calls = __import__("fastreft.tasks.tune", fromlist=["make_model"]).make_model, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:  # the second trial
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("fastreft.tasks.tune.make_model", stopped)
    assert main([*search, "--trials", "3"]) == 130
    assert main([*search, "--trials", "3"]) == 0
    states = [row["state"] for row in trials_of(tmp_path)]
    assert states.count("complete") == 3 and states.count("fail") == 1


def test_the_best_of_a_classifier_of_many_labels_is_the_trial_again(tmp_path):
    """Its head's rate, too, that was found with the rate: half as many times as there are labels."""
    bert, data, out = save_bert(tmp_path / "bert", [*"abcdefgh"]), tmp_path / "train.jsonl", tmp_path / "out"
    data.write_text("\n".join(json.dumps({"t": f"{a} {b}", "l": a}) for a in "abcdef" for b in "abcdefgh"))
    flags = ["--model", bert, "--train_file", str(data), "--text_field", "t", "--label_field", "l", "--hold_out", "12"]
    flags += ["--max_steps", "8", "--output_dir", str(out), "--search", "r=2,3", "--trials", "1", *QUICK]
    assert main(["tune", *flags]) == 0
    (trial,), settings = trials_of(tmp_path), yaml.safe_load((out / "best.yaml").read_text())
    assert settings["head_lr_scale"] == trial["head_lr_scale"] == 3
    assert main(["train", "--config", str(out / "best.yaml"), "--save_strategy", "no"]) == 0
    log = read_log(out / "best")
    assert log["learning_rate"] == trial["learning_rate"]
    assert log["evaluation"]["eval_accuracy"] == trial["eval_accuracy"]


def test_settings_that_do_not_go_together_are_a_trial_that_failed(search, tmp_path, capsys):
    """A tie by position is of so many tokens, and "all" of any number."""
    flags = [
        *search[: search.index("--search")],
        "--search",
        "tied=position,true",
        "positions=f1+l1,all",
        "--trials",
        "8",
    ]
    assert main(flags) == 0
    said, states = capsys.readouterr().out, [row["state"] for row in trials_of(tmp_path)]
    assert "note: trials failed: tied" in said and "complete" in states and "fail" in states
    assert (tmp_path / "out" / "best.yaml").is_file()


def test_a_study_of_other_settings_is_left_alone(search, tmp_path, capsys):
    assert main([*search, "--trials", "1"]) == 0
    before = trials_of(tmp_path)
    capsys.readouterr()
    for other in (["--max_steps", "3"], ["--search", "r=1,2,3"]):
        fails(main([*search, *other, "--trials", "2"]), capsys, "has a study of other settings (", other[0][2:])
    assert trials_of(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--trials", "0"], ["trials is 0"]),
        (["--timeout", "-1"], ["timeout is -1.0"]),
        (["--search", "rr=1,2"], ["there is no setting 'rr'; did you mean 'r'"]),
        (["--search", "r=1", "r=2"], ["search names r twice"]),
        (["--search", "learning_rate=1:2", "rate_factor=1:2"], ["both learning_rate and rate_factor"]),
        (["--method", "ia3"], ["search names r, which is a ReFT adapter's, and method is 'ia3'"]),
        (["--hold_out", "0"], ["a search needs records of its own"]),
    ],
)
def test_bad_searches(search, tmp_path, capsys, flags, parts):
    fails(main([*search, *flags]), capsys, *parts)
