"""``fastreft inspect --prompt``: the edited tokens of a text."""

import pytest
from shell import fails

from fastreft import ReftConfig, get_reft_model
from fastreft.cli import main
from fastreft.tasks.edited import marked
from fastreft.tasks.models import load_base


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    config = ReftConfig(task_type="CAUSAL_LM", r=2, positions="f1+l2", layers_to_transform=[0, 2])
    model = get_reft_model(load_base("embedded"), config)
    model.peft_config["default"].base_model_name_or_path = "embedded"
    model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def test_the_edited_tokens_are_marked(adapter, capsys):
    assert (
        main(["inspect", "--adapter", adapter, "--model", "embedded", "--prompt", "The king was hungry.", "Yes"]) == 0
    )
    out = capsys.readouterr().out
    assert "2 modules, model.layers.0 to model.layers.2: default at f1+l2 edits 3 tokens" in out
    line = next(line for line in out.splitlines() if "[The]" in line or line.strip().startswith("["))
    assert line.count("[") == 3 and line.replace("[", "").replace("]", "").strip().endswith("The king was hungry.")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give one folder"),
        (["--path", "a", "--adapter", "b"], "give one folder"),
        (["--adapter", "a", "--model", "embedded"], "--model is for --prompt"),
        (["--adapter", "nowhere", "--prompt", "x"], "there is no adapter in 'nowhere'"),
        (["--adapter", "a", "--prompt", ""], "--prompt is empty"),
    ],
)
def test_what_is_refused(flags, said, capsys):
    fails(main(["inspect", *flags]), capsys, said)


def test_brackets():
    assert marked(["a", " b", " c"], [0, 2]) == "[a] b[ c]"
