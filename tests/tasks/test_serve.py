"""``fastreft serve``: the flags, the server's command and its environment; the server itself is in tests/serving."""

import sys
from importlib.util import find_spec

import pytest
from shell import fails

from fastreft.cli import main
from fastreft.tasks import serve
from fastreft.tasks.flags.serve import parse


@pytest.fixture
def flags(tmp_path):
    return ["--model", "embedded", "--adapters", str(tmp_path)]


def test_all_other_flags_are_vllms(flags, tmp_path):
    arguments = parse([*flags, "--port", "8001", "--most_r", "8", "--enforce-eager"])
    assert arguments.rest == ["--port", "8001", "--enforce-eager"]
    command = serve.command_of(arguments, by_command=False)
    assert command[:4] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert command[5:] == ["--served-model-name", "embedded", "--port", "8001", "--enforce-eager"]
    assert serve.command_of(arguments, by_command=True)[2:4] == ["vllm.entrypoints.cli.main", "serve"]
    named = parse([*flags, "--served_model_name=mine"])
    assert serve.command_of(named, by_command=False)[5:] == ["--served_model_name=mine"]
    found = serve.environment_of(arguments, {"VLLM_PLUGINS": "other", "HOME": "here"})
    assert found == {
        "VLLM_PLUGINS": "other,fastreft", "HOME": "here", "FASTREFT_ADAPTERS": str(tmp_path.resolve()), "FASTREFT_MOST_R": "8"
    }  # fmt: skip
    assert serve.environment_of(named, {}) == {"FASTREFT_ADAPTERS": str(tmp_path.resolve())}


def test_it_becomes_the_server(flags, monkeypatch):
    ran = []
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    monkeypatch.setattr(serve, "entry_points", lambda group: [type("Entry", (), {"name": "fastreft"})])
    monkeypatch.setattr(serve.os, "execve", lambda *given: ran.append(given))
    serve.run(parse(flags))
    ((program, command, environment),) = ran
    assert program == command[0] == sys.executable and "FASTREFT_ADAPTERS" in environment
    monkeypatch.setattr(serve, "entry_points", lambda group: [])
    with pytest.raises(serve.UserError, match="vLLM would not find fastreft"):
        serve.run(parse(flags))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--adapters", "nowhere"], "there is no folder 'nowhere'"),
        (["--adapters", ""], "adapters is empty"),
        (["--model", "./nowhere"], "there is no model folder './nowhere'"),
        (["--most_r", "0"], "most_r is 0; it must be at least 1"),
        (["--lines", "many"], "invalid int value: 'many'"),
    ],
)
def test_bad_input(flags, capsys, changes, said):
    fails(main(["serve", *flags, *changes]), capsys, said)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm(flags, capsys):
    fails(main(["serve", *flags]), capsys, "vLLM is not installed here: pip install vllm")
