"""What is odd in files and flags is one sentence and exit code 2, and no Python of a folder is run unasked."""

import json
import shutil

import pytest
from shell import fails

from fastreft import ReftConfig, get_reft_model
from fastreft.cli import main
from fastreft.tasks.models import load_base
from fastreft.tasks.places import EMBEDDED_PATH


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_reft_model(load_base("embedded"), ReftConfig(task_type="CAUSAL_LM", r=2, positions="f1+l2"))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


CONFIGS = {
    "no JSON": "{",
    "a list": "[]",
    "nothing": "",
    "deep": "[" * 100_000,
    "digits": '{"peft_type": "REFT", "r": ' + "9" * 10_000 + "}",
    "no type": "{}",
    "another type": '{"peft_type": "NOBODY"}',
    "r true": '{"peft_type": "REFT", "r": true}',
    "a regular expression": '{"peft_type": "REFT", "target_modules": "("}',
    "positions": '{"peft_type": "REFT", "positions": ["f1"]}',
    "layers": '{"peft_type": "REFT", "layers_to_transform": {"a": 1}}',
    "act_fn": '{"peft_type": "REFT", "act_fn": 3}',
    "surrogate": '{"peft_type": "REFT", "positions": "\\ud800"}',
    "binary": b"\xff\xfe\x00",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("command", ["generate", "inspect", "convert"])
def test_an_adapters_configuration(case, command, adapter, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    text = CONFIGS[case]
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    flags = {
        "generate": ["--adapter", str(folder), "--model", "embedded", "--prompt", "x"],
        "inspect": ["--path", str(folder)],
        "convert": ["--source", str(folder), "--model", "embedded", "--output_dir", str(tmp_path / "out")],
    }[command]
    fails(main([command, *flags]), capsys, "adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "a: " + "9" * 10_000, "- 1", "", "a: [", "model: {a: b}", "r: true", "seed: 1e99", b"\xff\xfe"],
)
def test_a_yaml_file(text, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(main(["train", "--config", str(path)]), capsys)


RECORDS = {
    "deep.json": "[" * 100_000,
    "digits.jsonl": '{"prompt": ' + "9" * 10_000 + "}",
    "surrogate.jsonl": json.dumps({"prompt": "\ud800", "completion": "x"}),
    "wide.csv": "prompt,completion\n" + "x" * 200_000 + ",y\n",
    "binary.jsonl": "\0",
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_data_file(name, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(RECORDS[name])
    flags = ["--model", "embedded", "--train_file", str(path), "--output_dir", str(tmp_path / "out")]
    fails(main(["train", *flags]), capsys, str(path) if name != "wide.csv" else "leaves no room")


def strange_model(folder, where):
    """The embedded model with Python in its folder, which writes a file when it is run."""
    shutil.copytree(EMBEDDED_PATH, folder)
    (folder / "strange.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig): model_type = 'strange'\nclass M(LlamaForCausalLM): config_class = C\n"
        "class T(PreTrainedTokenizerFast): pass\n"
    )
    path = folder / where
    settings = json.loads(path.read_text())
    if where == "config.json":
        settings |= {
            "model_type": "strange",
            "auto_map": {"AutoConfig": "strange.C", "AutoModelForCausalLM": "strange.M"},
        }
    else:
        settings |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "strange.T"]}}
    path.write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("command", ["generate", "train"])
def test_no_python_out_of_a_models_folder(where, command, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = strange_model(tmp_path / "model", where)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    flags = {
        "generate": ["--adapter", str(adapter), "--prompt", "x"],
        "train": ["--train_file", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / "out")],
    }[command]
    code = main([command, "--model", str(folder), *flags, *(["--max_steps", "1"] if command == "train" else [])])
    assert not (folder / "ran").exists()
    if where == "config.json":
        fails(code, capsys, "--trust_remote_code")


def test_none_out_of_an_adapters_folder_whatever_is_said(adapter, tmp_path, capsys):
    folder = strange_model(tmp_path / "tokenizer", "tokenizer_config.json")
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    main(["generate", "--adapter", str(folder), "--model", "embedded", "--trust_remote_code", "--prompt", "x"])
    assert not (folder / "ran").exists()


def test_traceback_is_for_those_who_ask(capsys, monkeypatch):
    def broken(_):
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr("fastreft.tasks.info.run", broken)
    fails(main(["info"]), capsys, "a bug of two lines (--traceback shows where)")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info", "--traceback"])


def test_an_interrupt_while_modules_load(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["info"]) == 130 and "interrupted" in capsys.readouterr().err
