"""The command line, in-process: what it does, and the one sentence and exit code 2 for every bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from shell import fails

from fastreft.cli import COMMANDS, main

MODEL = "embedded"
RECORDS = [
    {"prompt": f"The {who} was {how}.", "completion": f' "I am {how}," said the {who}.'}
    for who in ("king", "boy", "dog", "cat")
    for how in ("sad", "happy", "old", "cold")
]


@pytest.fixture
def settings(tmp_path):
    """A run's settings, its data written; the test may change them before :func:`train`."""
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(map(json.dumps, RECORDS)))
    return {
        "model": MODEL,
        "train_file": str(data),
        "eval_file": str(data),
        "output_dir": str(tmp_path / "out"),
        "r": 2,
        "positions": "f2+l2",
        "layers_to_transform": [1, 2],
        "learning_rate": "1e-2",
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def train(settings, tmp_path, *flags):
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(settings))
    return main(["train", "--config", str(config), *flags])


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "fastreft" in capsys.readouterr().out


def test_unknown_command_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert "trian" in capsys.readouterr().err


def test_module_runs_as_the_script_does():
    done = subprocess.run([sys.executable, "-m", "fastreft", "--help"], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout


def test_info_says_what_runs(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("fastreft", "torch", "transformers", "peft", "python", "backend"))


def test_info_lists_the_models(capsys):
    assert main(["info", "--models"]) == 0
    out = capsys.readouterr().out
    assert "xlnet" in out and "squeezebert" in out and "past every hook" in out
    lines = out.splitlines()
    assert any(line.split()[:3] == ["llama", "yes", "checked"] and "model.layers.*" in line for line in lines)
    assert any(line.split()[:3] == ["squeezebert", "no", "-"] for line in lines)
    assert "  musicgen: not checked: " in out
    assert [line.split()[0].isdigit() for line in lines[-4:]] == [True] * 4 and lines[-1].endswith("do not work")


def test_train_then_generate(settings, tmp_path, capsys):
    assert train(settings, tmp_path, "--max_steps", "8") == 0  # a flag overrides the file
    out = capsys.readouterr().out
    assert "for 8 steps" in out
    assert "train loss" in out
    assert "eval loss" in out
    saved = tmp_path / "out"
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["r"], config["positions"], config["layers_to_transform"]) == (2, "f2+l2", [1, 2])
    assert config["base_model_name_or_path"] == MODEL
    assert (saved / "tokenizer_config.json").is_file()
    assert not list(saved.glob(".saving-*"))
    card = (saved / "README.md").read_text()
    assert "# loreft of embedded" in card and "| r | 2 |" in card and "| steps | 8 |" in card
    assert main(["inspect", str(saved)]) == 0
    trained = json.loads((saved / "training.json").read_text())["trained_numbers"]
    assert f"\n2 interventions, {trained:,} numbers\n" in capsys.readouterr().out

    prompts = ["--prompt", "The king was sad.", "The dog was old."]
    assert main(["generate", "--adapter", str(saved), *prompts, "--max_new_tokens", "6", "--base"]) == 0
    both = capsys.readouterr().out
    assert both.startswith("[1] The king was sad.\nbase: ")
    assert "\nadapter: " in both
    (tmp_path / "prompts.txt").write_text("The king was sad.\n\n")
    alone = ["generate", "--adapter", str(saved), "--prompt_file", str(tmp_path / "prompts.txt")]
    assert main([*alone, "--max_new_tokens", "6"]) == 0
    assert f"\nadapter: {capsys.readouterr().out}" in both  # alone, the prompt has no padding
    assert main([*alone, "--max_new_tokens", "6", "--do_sample", "--temperature", "0.7", "--seed", "1"]) == 0


def test_resume_ends_where_an_unbroken_run_ends(settings, tmp_path):
    from safetensors.torch import load_file

    assert train(settings, tmp_path) == 0
    whole = load_file(tmp_path / "out" / "adapter_model.safetensors")
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    again = settings | {"output_dir": str(tmp_path / "again")}
    assert train(again, tmp_path, "--resume_from_checkpoint", checkpoint) == 0
    resumed = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all((whole[name] == resumed[name]).all() for name in whole)


def test_an_adapter_in_output_dir_stays_until_the_new_one_is_whole(settings, tmp_path, monkeypatch, capsys):
    assert train(settings, tmp_path) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("adapter*")}

    real = os.replace

    def full_disk(source, target):
        if str(target).startswith(str(tmp_path / "out")):
            raise OSError("no space left")
        real(source, target)

    monkeypatch.setattr("os.replace", full_disk)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = train(settings | {"save_strategy": False, "seed": 7}, tmp_path)  # "no", as YAML reads it
    fails(code, capsys, "cannot write into", "no space left", "the trained adapter is in")
    assert len(list(tmp_path.glob("fastreft-*/adapter_model.safetensors"))) == 1
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("adapter*")}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"train_file": "nowhere.jsonl"}, ["cannot read the data file 'nowhere.jsonl'"]),
        ({"prompt_field": "promt"}, ["line 1", "no field 'promt'", "did you mean 'prompt'"]),
        ({"model": "./nowhere"}, ["no model folder './nowhere'"]),
        ({"model": "nobody/no-such-model-at-all"}, ["nobody/no-such-model-at-all"]),
        ({"r": 100000}, ["100000"]),
        ({"r": "four"}, ["invalid int value: 'four'"]),
        ({"positions": "x9"}, ["positions is 'x9'"]),
        ({"layers_to_transform": [99]}, ["99"]),
        ({"intervention_type": "lorefft"}, ["lorefft"]),
        ({"learning_rat": 1}, ["unknown setting 'learning_rat'", "did you mean 'learning_rate'"]),
        ({"train_file": None}, ["give either --task or --train_file"]),
        ({"output_dir": None}, ["required", "output_dir"]),
        ({"max_length": 100000}, ["max_length is 100000", "context"]),
        ({"dtype": "float33"}, ["'float33' is not a dtype"]),
        ({"resume_from_checkpoint": "nowhere"}, ["'nowhere' is not a checkpoint"]),
        ({"learning_rate": -0.01}, ["learning_rate is -0.01; it must be at least 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate is nan"]),
        ({"adam_beta1": 1.0}, ["adam_beta1 is 1.0"]),
        ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size is 0"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"target_modules": "("}, ["target_modules", "no regular expression"]),
        ({"report_to": "tensorboard_of_nobody"}, ["tensorboard_of_nobody"]),
        ({"output_dir": ""}, ["output_dir"]),
        ({"resume_from_checkpoint": True}, ["no checkpoint in"]),
        ({"eval_strategy": "sometimes"}, ["sometimes"]),
        ({"optim": "sgd"}, ["optim is 'sgd'", "ReftAdamW"]),
        ({"optim": "adamw_bnb_8bit"}, ["optim is 'adamw_bnb_8bit'"]),
        ({"optim_args": "a=1"}, ["optim_args is 'a=1'"]),
        ({"max_steps": 0}, ["max_steps is 0; it must be at least 1, or -1"]),
        ({"max_steps": -5}, ["max_steps is -5"]),
        ({"modules_to_save": ["nope"]}, ["modules_to_save is ['nope']", "no module whose name ends in 'nope'"]),
        ({"model": ""}, ["model is empty"]),
    ],
)
def test_bad_settings(settings, tmp_path, capsys, monkeypatch, change, parts):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails(train(settings | change, tmp_path), capsys, *parts)
    assert not (tmp_path / "out").exists()


def test_label_smoothing_keeps_the_labels_for_the_prompt(settings, tmp_path, monkeypatch):
    reports = []
    monkeypatch.setattr("fastreft.tasks.train._save", lambda model, *_: reports.append(model.reft_report()))
    del settings["eval_file"]
    for smoothing in (0, 0.1):
        assert train(settings | {"label_smoothing_factor": smoothing, "max_steps": 1}, tmp_path) == 0
    plain, smoothed = reports
    assert plain == smoothed and max(map(max, plain.edits[0].columns)) < max(plain.prompt_lengths)


@pytest.mark.parametrize(
    ("command", "flags", "name"),
    [
        ("convert", ["--source", "{}", "--output_dir", ""], "output_dir"),
        ("convert", ["--source", "", "--output_dir", "out"], "source"),
        ("inspect", ["--path", ""], "path"),
        ("inspect", ["--adapter", ""], "adapter"),
        ("generate", ["--adapter", "", "--prompt", "x"], "adapter"),
        ("demo", ["--output_dir", ""], "output_dir"),
    ],
)
def test_an_empty_name_is_not_the_current_folder(command, flags, name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(main([command, *(flag.format(tmp_path) for flag in flags)]), capsys, f"{name} is empty; give a folder")
    assert not list(tmp_path.iterdir())


def test_bad_train_files(settings, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    fails(train(settings | {"train_file": str(bad)}, tmp_path), capsys, "bad JSON in line 2")
    bad.write_text("")
    fails(train(settings | {"eval_file": str(bad)}, tmp_path), capsys, "has no records")
    fails(main(["train", "--config", str(tmp_path / "none.yaml")]), capsys, "cannot read the config file")
    bad.write_text("a: [1")
    fails(main(["train", "--config", str(bad)]), capsys, "not valid YAML")
    bad.write_text("just words")
    fails(main(["train", "--config", str(bad)]), capsys, "holds no settings")
    fails(
        train(settings, tmp_path, "--learning_rat", "1"), capsys, "unknown argument '--learning_rat'", "--learning_rate"
    )
    assert not (tmp_path / "out").exists()


def test_bad_generate(settings, tmp_path, capsys):
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastreft.tasks.places import find_model

    ask = ["--prompt", "The king", "--max_new_tokens", "2"]
    fails(main(["generate", *ask]), capsys, "required", "--adapter")
    fails(main(["generate", "--adapter", str(tmp_path), *ask]), capsys, "there is no adapter in")
    assert train(settings, tmp_path) == 0
    capsys.readouterr()
    adapter = ["generate", "--adapter", settings["output_dir"]]
    fails(main(adapter), capsys, "nothing to complete")
    fails(main([*adapter, "--prompt_file", str(tmp_path / "none.txt")]), capsys, "cannot read the prompt file")
    fails(main([*adapter, *ask, "--max_new_tokens", "0"]), capsys, "at least 1")
    fails(main([*adapter, *ask, "--do_sample", "--temperature", "0"]), capsys, "--temperature")
    fails(main([*adapter, *ask, "--chat"]), capsys, "chat template")
    fails(main([*adapter, *ask, "--model", str(tmp_path / "none")]), capsys, "no model folder")
    config = AutoConfig.from_pretrained(find_model(MODEL)[0])
    for name, change in {"narrow": {"hidden_size": 96}, "shallow": {"num_hidden_layers": 2}}.items():
        config.update({"num_hidden_layers": 3, "layer_types": None} | change)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        fails(main([*adapter, *ask, "--model", str(tmp_path / name)]), capsys, "does not fit the model", name)


def test_bad_demo(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fails(main(["demo", "--steps", "0"]), capsys, "at least 1")
    fails(main(["demo", "--output_dir", str(tmp_path / "file")]), capsys, "is a file")
    fails(main(["demo", "--model", str(tmp_path / "none")]), capsys, "no model folder")
