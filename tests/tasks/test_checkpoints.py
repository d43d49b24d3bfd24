"""Which checkpoint a run goes on from: the newest whole one, and none with a part missing."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fastreft.tasks.checkpoints import lacks, newest_whole
from fastreft.tasks.errors import UserError

PARTS = (
    "trainer_state.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in PARTS:
        if name.endswith(".json"):
            (path / name).write_text(json.dumps({"step": step}))
        elif name.endswith(".safetensors"):
            save_file({"R": torch.ones(2)}, path / name)
        else:
            torch.save({"x": torch.ones(64)}, path / name)
    return path


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_the_newest_whole_one_is_taken(part, how, tmp_path, capsys):
    whole, broken = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert lacks(whole) is None and newest_whole(str(tmp_path)) == str(broken)
    data = (broken / part).read_bytes()
    (broken / part).unlink()
    if how != "missing":
        (broken / part).write_bytes(b"" if how == "empty" else data[: len(data) // 2])
    assert lacks(broken) == f"no {part} that can be read"
    assert newest_whole(str(tmp_path)) == str(whole)
    assert f"not whole: checkpoint-10 (no {part} that can be read)" in capsys.readouterr().out


def test_no_whole_one(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        newest_whole(str(tmp_path))
    (checkpoint(tmp_path, 1) / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"there is no whole checkpoint in .*checkpoint-1 .no optimizer.pt"):
        newest_whole(str(tmp_path))
