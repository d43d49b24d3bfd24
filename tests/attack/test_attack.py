"""A seeded attack on files, configurations and flags: refused in words with nothing changed, or right.

``make attack`` runs thousands and prints what became of them; FASTREFT_ATTACK=N and FASTREFT_SEED=K choose how many and which.
"""

import json
import os
import random
import shutil
import signal
import struct
import time

import pytest
import torch
from mutations import CASES, ODD, SEED, cut, flipped, grown, spoil, state_of
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import batch, logits, make

from fastreft import ReftConfig, get_reft_model
from fastreft.cli import main
from fastreft.files import staged
from fastreft.tuner.loading import layers_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIELDS = (
    *(
        "intervention_type",
        "r",
        "positions",
        "tied",
        "layers_to_transform",
        "component",
        "target_modules",
        "exclude_modules",
    ),
    *("dropout", "act_fn", "add_bias", "pyreft_compat", "modules_to_save"),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    get_reft_model(make("llama"), ReftConfig(r=3, positions="f2+l3")).save_pretrained(folder)
    return folder


def another_header(data, dice):
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    key = dice.choice(list(header))
    change = dice.choice(("dtype", "shape", "data_offsets", "name", "gone"))
    if change == "gone":
        del header[key]
    elif change == "name":
        header[key[: dice.randrange(len(key))] + "x"] = header.pop(key)
    else:
        header[key][change] = dice.choice(("F64", "I8", "BOOL", [], [1], [-1, 3], [0, 2**60], [3, 32], 7, None))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def another_tensor(folder, dice):
    tensors = {key: value.clone() for key, value in load_file(folder / WEIGHTS).items()}
    spoil(tensors, dice)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.filterwarnings("ignore")
def test_mutated_adapters(good, tmp_path, counts):
    dice, base = random.Random(SEED), make("llama")
    before, plain = state_of(base), logits(base, batch())
    data = (good / WEIGHTS).read_bytes()
    for i in range(CASES):
        folder = tmp_path / "adapter"
        shutil.copytree(good, folder)
        way = dice.choice((flipped, cut, grown, another_header, another_tensor))
        if way is another_tensor:
            another_tensor(folder, dice)
        else:
            (folder / WEIGHTS).write_bytes(way(data, dice))
        refused = None
        try:
            model = PeftModel.from_pretrained(base, folder)
        except Exception as error:  # whatever the reader says
            refused = error
        if refused is not None:
            assert str(refused), (i, way)
            after = state_of(base)
            assert before[1:] == after[1:] and all(torch.equal(before[0][k], after[0][k]) for k in before[0]), (i, way)
            counts[f"adapter, {way.__name__}: refused"] += 1
        else:
            for layer in layers_of(base):
                held = layer.reft_edit["default"]
                assert all(p.isfinite().all() for p in held.parameters()), (i, way)
                assert (held.R @ held.R.T - torch.eye(3)).abs().max() <= 1e-2, (i, way)
            counts[f"adapter, {way.__name__}: loaded, and right"] += 1
            base = model.unload()
            base.requires_grad_(True)
        shutil.rmtree(folder)
    assert torch.equal(logits(base, batch()), plain)


def test_fuzzed_configurations(tmp_path, counts):
    dice = random.Random(SEED + 1)
    for i in range(10 * CASES):
        given = {dice.choice(FIELDS): dice.choice(ODD) for _ in range(dice.choice((1, 1, 2)))}
        refused = None
        try:
            config = ReftConfig(**given)
        except (ValueError, TypeError) as error:
            refused = error
        if refused is not None:
            said = str(refused)
            assert any(name in said for name in given) and len(said) < 800, (i, given, said[:200])
            counts["configuration: refused"] += 1
            continue
        config.save_pretrained(tmp_path)
        again = ReftConfig.from_pretrained(tmp_path)
        assert all(getattr(again, name) == getattr(config, name) for name in given), (i, given)
        counts["configuration: kept"] += 1


WORDS = [
    "",
    "x",
    "-1",
    "0",
    "1e99",
    "nan",
    "inf",
    "9" * 400,
    "(",
    "true",
    "embedded",
    "/nowhere",
    ".",
    "f1",
    "[1",
    "\u00e9",
    "--r",
]
FLAGS = {
    "inspect": ("--path", "--adapter", "--model", "--prompt", "--intervention_type"),
    "convert": ("--source", "--output_dir", "--positions", "--dropout", "--dtype", "--act_fn", "--intervention_type"),
    "generate": (
        "--adapter",
        "--prompt",
        "--max_new_tokens",
        "--batch_size",
        "--temperature",
        "--top_p",
        "--seed",
        "--dtype",
    ),
}


@pytest.mark.filterwarnings("ignore")
def test_fuzzed_flags(good, tmp_path, counts, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dice = random.Random(SEED + 2)
    for i in range(CASES):
        command = dice.choice(list(FLAGS))
        flags = []
        for flag in dice.sample(FLAGS[command], dice.randint(1, 4)):
            flags += [flag, dice.choice([*WORDS, str(good)])]
        code = main([command, *flags])
        said = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in said, (i, command, flags, said[-300:])
        if code == 2:
            assert sum(line.startswith("fastreft ") for line in said.splitlines()) == 1, (
                i,
                command,
                flags,
                said[-300:],
            )
        counts[f"flags, {command}: exit {code}"] += 1


def test_kills_at_random_moments(tmp_path, counts):
    dice = random.Random(SEED + 3)

    def write(text):
        with staged(tmp_path / "out", last=CONFIG) as staging:
            for name in (CONFIG, WEIGHTS, "tokenizer.json"):
                (staging / name).write_text(text * 1000)

    write("0")
    for i in range(1, CASES // 2 + 1):
        child = os.fork()
        if child == 0:
            for k in range(10_000):
                write(f"{i % 10}" if k % 2 else "x")
            os._exit(0)
        time.sleep(dice.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        held = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file()}
        if CONFIG in held:
            assert len(set(held.values())) == 1 and len(held[CONFIG]) == 1000, i
            counts["kill: whole"] += 1
        else:
            counts["kill: nothing to be read"] += 1
        write("y")
        assert not list((tmp_path / "out").glob(".saving-*"))
