"""``fastreft convert`` and ``fastreft inspect``, in-process."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from shell import fails

import fastreft
from fastreft.cli import main
from fastreft.pyreft import checkpoint, format
from fastreft.pyreft.checkpoint import Entry
from fastreft.tasks.models import load_base

MODEL = "embedded"


@pytest.fixture(scope="module")
def base():
    return load_base(MODEL)


@pytest.fixture
def theirs(tmp_path, base):
    """A pyreft checkpoint for the embedded model: prefix and suffix on layers 1 and 2."""
    torch.manual_seed(0)
    made = [fastreft.LoreftIntervention(embed_dim=base.config.hidden_size, low_rank_dimension=4) for _ in range(4)]
    places = [(1, "block_output"), (2, "block_output")] * 2
    checkpoint.write(tmp_path / "theirs", [Entry(*place, m) for place, m in zip(places, made, strict=True)])
    return tmp_path / "theirs"


def test_there_and_back_bit_for_bit(theirs, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    arguments = ["convert", "--source", str(theirs), "--output_dir", str(ours), "--model", MODEL]
    assert main([*arguments, "--positions", "f2+l3"]) == 0
    assert "loreft of rank 4, positions f2+l3, act_fn linear" in capsys.readouterr().out
    config = json.loads((ours / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["tied"], config["layers_to_transform"]) == (MODEL, False, [1, 2])
    assert main(["convert", "--source", str(ours), "--output_dir", str(back)]) == 0
    assert "no place for its positions (f2+l3)" in capsys.readouterr().out
    for file in theirs.glob("*.bin"):
        first, second = format.read_tensors(file), format.read_tensors(back / file.name)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert (theirs / "config.json").read_text() == (back / "config.json").read_text()


def test_what_is_converted_generates_as_what_is_loaded(theirs, tmp_path, base, capsys):
    assert main(["convert", "--source", str(theirs), "--output_dir", str(tmp_path / "ours"), "--model", MODEL]) == 0
    assert "positions f1+l1 (the default;" in capsys.readouterr().out
    ids = torch.tensor([[5, 9, 20, 7]])
    direct = fastreft.pyreft.load(theirs, load_base(MODEL))
    converted = PeftModel.from_pretrained(load_base(MODEL), tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(direct(input_ids=ids).logits, converted(input_ids=ids).logits)
    assert main(["generate", "--adapter", str(tmp_path / "ours"), "--prompt", "The king", "--max_new_tokens", "3"]) == 0


def test_inspect_both_kinds(theirs, tmp_path, capsys):
    assert main(["inspect", "--path", str(theirs)]) == 0
    out = capsys.readouterr().out
    assert out.count("block_output") == 4
    assert "loreft" in out
    main(["convert", "--source", str(theirs), "--output_dir", str(tmp_path / "ours"), "--model", MODEL])
    capsys.readouterr()
    assert main(["inspect", "--path", str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert "positions f1+l1" in out
    assert out.count("(suffix)") == 2


def test_bad_input_is_a_sentence(theirs, tmp_path, base, capsys):
    out = ["--output_dir", str(tmp_path / "out")]
    fails(main(["convert", "--source", str(theirs), *out]), capsys, "give the base model with --model")
    fails(main(["convert", "--source", str(tmp_path / "none"), *out, "--model", MODEL]), capsys, "there is no folder")
    named = ["convert", "--source", str(theirs), "--model", MODEL]
    fails(main([*named, "--output_dir", str(theirs)]), capsys, "is a file or the source itself")
    fails(main([*named, *out, "--positions", "l2"]), capsys, "it must be 'fN+lM'")
    fails(main([*named, *out, "--dtype", "int8"]), capsys, "'int8' is not a dtype")
    fails(main([*named, *out, "--act_fn", "nothing"]), capsys, "act_fn 'nothing'")
    fails(main(["inspect", "--path", str(tmp_path)]), capsys, "is not a pyreft checkpoint")
    LoraConfig(r=2).save_pretrained(tmp_path / "lora")
    fails(main(["convert", "--source", str(tmp_path / "lora"), *out]), capsys, "is not a ReFT adapter")
    fails(main(["inspect", "--path", str(tmp_path / "lora")]), capsys, "is not a ReFT adapter")
    assert not (tmp_path / "out").exists()


def test_a_drifted_rotation_is_noted(tmp_path, base, capsys):
    made = fastreft.LoreftIntervention(embed_dim=base.config.hidden_size, low_rank_dimension=4)
    with torch.no_grad():
        made.R.mul_(1.1)
    checkpoint.write(tmp_path / "theirs", [Entry(1, "block_output", made)])
    named = ["convert", "--source", str(tmp_path / "theirs"), "--model", MODEL, "--output_dir", str(tmp_path / "ours")]
    assert main(named) == 0
    assert "note: 1 of the 1 interventions" in capsys.readouterr().out
    assert main([*named, "--orthonormalise"]) == 0
    assert "note:" not in capsys.readouterr().out


def test_what_pyrefts_files_have_no_place_for(theirs, tmp_path, base, capsys):
    config = fastreft.ReftConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"])
    model = fastreft.get_reft_model(load_base(MODEL), config)
    model.peft_config["default"].base_model_name_or_path = MODEL
    model.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    given = ["convert", "--source", str(tmp_path / "head"), "--output_dir", str(tmp_path / "out")]
    fails(main(given), capsys, "holds more than edits", "lm_head", "modules_to_save")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="modules_to_save: the adapter 'default' has lm_head trained whole"):
        fastreft.pyreft.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trained_base_in_a_pyreft_checkpoint_is_noted(theirs, tmp_path, base, capsys):
    torch.save({"model.norm.weight": base.model.norm.weight.detach() + 1}, theirs / "pytorch_model.bin")
    given = ["convert", "--source", str(theirs), "--model", MODEL, "--output_dir", str(tmp_path / "ours")]
    assert main(given) == 0
    assert "note: " in (out := capsys.readouterr().out) and "trained, too, such as model.norm.weight" in out
