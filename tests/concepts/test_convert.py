"""``fastreft convert`` and control vectors: there and back to the byte, and what cannot be one is said."""

from __future__ import annotations

import pytest
import torch

from fastreft import ReftConfig, get_reft_model
from fastreft.cli import main
from fastreft.concepts import save_gguf
from fastreft.tasks.models import load_base

pytest.importorskip("gguf", reason="there is no gguf here")


def convert(capsys, source, target, *more):
    """(exit code, the last line that was printed)."""
    code = main(["convert", "--source", str(source), "--output_dir", str(target), *more])
    said = capsys.readouterr()
    return code, (said.out or said.err).strip().splitlines()[-1]


def test_there_and_back(tmp_path, capsys):
    torch.manual_seed(0)
    save_gguf(tmp_path / "a.gguf", {1: torch.randn(192), 3: torch.randn(192)}, "llama")
    assert convert(capsys, tmp_path / "a.gguf", tmp_path / "adapter", "--model", "embedded")[0] == 0
    assert convert(capsys, tmp_path / "adapter", tmp_path / "b.gguf")[0] == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("source", "target", "more", "said"),
    [
        ("loreft", "a.gguf", (), "is no control vector: the edit at model.layers.2 is no single vector"),
        ("none.gguf", "out", ("--model", "embedded"), "cannot read the control vectors"),
        ("odd.gguf", "out", ("--model", "embedded"), "is no GGUF file"),
        ("odd.gguf", "out", (), "give the base model with --model: a control vector does not name it"),
        ("nowhere", "a.gguf", (), "nowhere"),
    ],
)
def test_what_is_none(tmp_path, capsys, source, target, more, said):
    (tmp_path / "odd.gguf").write_bytes(b"GGUF")
    if source == "loreft":
        config = ReftConfig(task_type="CAUSAL_LM", layers_to_transform=[2], base_model_name_or_path="embedded")
        get_reft_model(load_base("embedded"), config).save_pretrained(tmp_path / "loreft")
    code, line = convert(capsys, tmp_path / source, tmp_path / target, *more)
    assert code != 0
    assert said in line
    assert not (tmp_path / target).exists()
