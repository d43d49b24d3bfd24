"""``fastreft inspect`` of adapters whose file is not what their configuration says: one sentence, and never an empty table."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from shell import fails

from fastreft import ReftConfig, get_reft_model
from fastreft.cli import main
from fastreft.tasks.models import load_base

WEIGHTS = "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.reft.reft_edit."


def saved(folder, **settings):
    torch.manual_seed(0)
    config = ReftConfig(
        **({"task_type": "CAUSAL_LM", "r": 2, "positions": "f1+l2", "layers_to_transform": [0, 2]} | settings)
    )
    model = get_reft_model(load_base("embedded"), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("adapter"))


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(name)}


def with_first(name, make):
    return lambda tensors: tensors | {FIRST + name: make(tensors.get(FIRST + name))}


FILES = {
    "empty": (lambda _: {}, "holds no edit"),
    "foreign": (lambda _: {"foo": torch.ones(3)}, "holds no edit, but foo"),
    "no R": (without(".R"), "no loreft of rank 2 at model.layers.0: its R is missing"),
    "R a vector": (with_first("R", lambda t: torch.ones(5)), "its R is (5,)"),
    "R of three": (with_first("R", lambda t: torch.ones(2, 2, 2)), "its R is (2, 2, 2)"),
    "R of nothing": (with_first("R", lambda t: torch.ones(0, t.shape[1])), "its R is (0, "),
    "another rank": (with_first("W", lambda t: t[:1].contiguous()), "its W is (1, "),
    "one more": (with_first("foo", lambda t: torch.ones(3)), "its foo is (3,), and must be left out"),
    "NaN": (with_first("R", lambda t: t * float("nan")), "values that are not finite"),
    "float8": (with_first("R", lambda t: t.to(torch.float8_e4m3fn)), "is torch.float8_e4m3fn"),
    "bool": (with_first("R", lambda t: t > 0), "is torch.bool"),
    "complex": (with_first("R", lambda t: t.to(torch.complex64)), "is torch.complex64"),
}
SETTINGS = {
    "tied": ({"tied": "position"}, "has 1 interventions at model.layers.0, and its tied 'position'"),
    "untied": ({"tied": False}, "means 2"),
    "component": ({"component": "mlp_output"}, "edits model.layers.0, which is no mlp_output"),
    "kind": ({"intervention_type": "lobireft"}, "no lobireft of rank 2"),
    "rank": ({"r": 3}, "no loreft of rank 3"),
    "activation": ({"act_fn": "prelu"}, "its act.weight is missing"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file(case, adapter, tmp_path, capsys):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change, said = FILES[case]
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    fails(main(["inspect", "--adapter", str(folder)]), capsys, said)


@pytest.mark.parametrize("case", SETTINGS)
def test_a_configuration(case, adapter, tmp_path, capsys):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    change, said = SETTINGS[case]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    fails(main(["inspect", "--adapter", str(folder)]), capsys, said)


@pytest.mark.parametrize(
    "settings",
    [
        {"tied": "position"},
        {"tied": False},
        {"component": "mlp_output"},
        {"component": "block_input"},
        {"act_fn": "xielu"},
        {"intervention_type": "noreft", "add_bias": True},
        {"target_modules": ["o_proj"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_what_is_whole_is_shown(settings, tmp_path, capsys):
    saved(tmp_path, **settings)
    assert main(["inspect", "--adapter", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) >= 4
    assert ("tensors that are no edit's, such as base_model.model.lm_head" in out) is ("modules_to_save" in settings)


def test_the_tokens_of_a_lora_adapter(tmp_path, capsys):
    get_peft_model(load_base("embedded"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    given = ["inspect", "--adapter", str(tmp_path), "--model", "embedded", "--prompt", "x"]
    fails(main(given), capsys, "is not a ReFT adapter")
