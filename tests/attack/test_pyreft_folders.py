"""Spoilt folders of pyreft's: one sentence and the model as it was, or an adapter that is sound."""

import json
import random
import shutil

import pytest
import torch
from drop_in import as_trainers, write
from mutations import CASES, ODD, SEED, cut, flipped, grown, spoil, state_of
from tiny import batch, logits, make

from fastreft import pyreft
from fastreft.interventions import INTERVENTIONS
from fastreft.tuner.loading import layers_of

AS_JSON = [value for value in ODD if isinstance(value, (str, int, float, list, dict, type(None)))]


def another_file(folder, dice):
    path = dice.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    path.write_bytes(dice.choice((flipped, cut, grown))(path.read_bytes(), dice))


def another_tensor(folder, dice):
    path = dice.choice(sorted(folder.rglob("intkey_*.bin")))
    tensors = torch.load(path, weights_only=True)
    spoil(tensors, dice)
    torch.save(tensors, path)


def another_setting(folder, dice):
    """Some value within config.json, however deep, or its key, is another."""
    path = folder / "config.json"
    holder = settings = json.loads(path.read_text())
    while True:
        key = dice.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[key], (dict, list)) or not holder[key] or dice.random() < 0.2:
            break
        holder = holder[key]
    if isinstance(holder, list) and dice.random() < 0.2:
        holder.insert(key, dice.choice(AS_JSON))
    elif dice.random() < 0.2:
        del holder[key]
    else:
        holder[key] = dice.choice(AS_JSON)
    path.write_text(json.dumps(settings))


def another_name(folder, dice):
    path = dice.choice(sorted(folder.rglob("intkey_*.bin")))
    name = dice.choice(
        (
            path.name.replace("layer_0", "layer_7"),
            path.name.replace("block_output", "mlp_output"),
            path.name.replace("#0", "#1"),
            path.name.replace("pos", "h.pos"),
            "intkey_x.bin",
        )
    )
    data = path.read_bytes()
    if dice.random() < 0.5:
        path.unlink()
    path.with_name(name).write_bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_spoilt_folders(tmp_path, counts):
    dice, base = random.Random(SEED + 6), make("llama")
    before, plain = state_of(base), logits(base, batch())
    for i in range(CASES):
        folder, kind = tmp_path / "saved", dice.choice(list(INTERVENTIONS))
        write(folder, kind)
        way = dice.choice((another_file, another_tensor, another_setting, another_name))
        way(folder, dice)
        if way is not another_setting and dice.random() < 0.3:
            as_trainers(folder)
        refused = None
        try:
            model = pyreft.load(folder, base, intervention_type=dice.choice((None, kind)))
        except ValueError as error:
            refused = error
        if refused is not None:
            assert str(refused) and "\n" not in str(refused) and len(str(refused)) < 600, (i, way, refused)
            after = state_of(base)
            assert before[1:] == after[1:] and all(torch.equal(before[0][k], after[0][k]) for k in before[0]), (i, way)
            counts[f"pyreft, {way.__name__}: refused"] += 1
        else:
            for layer in layers_of(base):
                held = layer.reft_edit["default"]
                assert all(p.isfinite().all() for p in held.parameters()), (i, way)
                assert held.r == 3 and held.embed_dim == before[0]["lm_head.weight"].shape[1], (i, way)
            counts[f"pyreft, {way.__name__}: loaded, and sound"] += 1
            base = model.unload()
            base.requires_grad_(True)
        shutil.rmtree(folder)
    assert torch.equal(logits(base, batch()), plain)
