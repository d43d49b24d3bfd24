"""Whatever is wrong with a folder of pyreft's: one sentence, the model as it was, and nothing executed."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
import torch
from drop_in import as_trainers, interventions, write
from tiny import LAYERS, WIDTH, hooks_on, make
from torch import nn

from fastreft import pyreft
from fastreft.interventions import INTERVENTIONS
from fastreft.pyreft import checkpoint, format


def edit_config(folder, change):
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))


def edit_tensors(folder, change):
    file = min(folder.glob("*.bin"))
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


class Bomb:
    """What unpickling would run: it leaves a folder behind."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


def bomb(folder):
    """A file as torch.save writes it, whose pickle runs something."""
    torch.save({"weight": Bomb(folder)}, min(folder.glob("*.bin")))


def represent(index, value):
    return lambda folder: edit_config(folder, lambda s: s["representations"][0].__setitem__(index, value))


def tensor(name, change):
    return lambda folder: edit_tensors(folder, lambda s: s.__setitem__(name, change(s[name])))


def beyond(folder):
    represent(0, 9)(folder)
    min(folder.glob("*.bin")).rename(folder / "intkey_layer_9_comp_block_output_unit_pos_nunit_1#0.bin")


BAD = {
    "no folder": (lambda f: shutil.rmtree(f), "there is no folder"),
    "nothing in it": (lambda f: [file.unlink() for file in f.glob("*.bin")], "it has no intkey_"),
    "a file missing": (lambda f: min(f.glob("*.bin")).unlink(), "there is no intkey_layer_0"),
    "a file over": (
        lambda f: shutil.copy(min(f.glob("*.bin")), f / "intkey_layer_1_comp_block_output_unit_pos_nunit_1#1.bin"),
        "does not list intkey_layer_1",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "'config.json' is not pyreft's"),
    "other JSON": (lambda f: (f / "config.json").write_text("[1]"), "'config.json' is not pyreft's"),
    "types missing": (lambda f: edit_config(f, lambda s: s["intervention_types"].pop()), "as many intervention_types"),
    "another class": (
        lambda f: edit_config(f, lambda s: s["intervention_types"].__setitem__(0, "<class 'pyvene.ZeroIntervention'>")),
        "none of pyreft's six interventions",
    ),
    "a class of code": (
        lambda f: edit_config(f, lambda s: s["intervention_types"].__setitem__(0, "__import__('os')")),
        "none of pyreft's six interventions",
    ),
    "heads": (represent(2, "h.pos"), "it must be a layer, a component, 'pos', 1 and a rank"),
    "a link": (represent(9, 0), "linked interventions and sources are not supported"),
    "a subspace beyond": (represent(7, [[0, 4]]), "subspace_partition gives '0' the row 3; r is 3"),
    "no subspace": (represent(7, 4), "subspace_partition is 4; it must be a list of groups of rows"),
    "another rank": (represent(4, 9), "has rank 3, but config.json says low_rank_dimension 9"),
    "a layer beyond": (
        lambda f: (
            represent(0, 9)(f),
            min(f.glob("*.bin")).rename(f / "intkey_layer_9_comp_block_output_unit_pos_nunit_1#0.bin"),
        ),
        "layer is 9; LlamaForCausalLM has layers 0 to 2",
    ),
    "an empty file": (lambda f: min(f.glob("*.bin")).write_bytes(b""), "cannot read 'intkey_layer_0"),
    "a text file": (lambda f: min(f.glob("*.bin")).write_text("hello"), "cannot read 'intkey_layer_0"),
    "a bomb": (bomb, "cannot read 'intkey_layer_0"),
    "a list": (lambda f: torch.save([torch.ones(1)], min(f.glob("*.bin"))), "holds a list"),
    "a number": (lambda f: edit_tensors(f, lambda s: s.__setitem__("bias", 3)), "it must hold tensors by name"),
    "a name missing": (
        lambda f: edit_tensors(f, lambda s: s.pop("bias")),
        "is not a loreft intervention: it lacks 'bias'",
    ),
    "a name over": (
        lambda f: edit_tensors(f, lambda s: s.__setitem__("other", torch.ones(1))),
        "is not a loreft intervention: it holds 'other'",
    ),
    "NaN": (tensor("weight", lambda t: t * float("nan")), "W .* holds values that are not finite"),
    "integers": (tensor("weight", lambda t: t.int()), r"weight \(torch.int32\) holds values of no dtype"),
    "float8": (tensor("rotate_layer", lambda t: t.to(torch.float8_e5m2)), r"rotate_layer .* holds values of no dtype"),
    "a vector": (tensor("rotate_layer", lambda t: t[0]), "R has shape"),
    "transposed": (tensor("rotate_layer", lambda t: t.T), r"R has shape \(32, 3\), as \(r, d\); r must be"),
    "another width": (tensor("weight", lambda t: t[:, :8]), r"W has shape \(3, 8\); beside R it must be \(3, 32\)"),
    "sparse": (tensor("weight", lambda t: t.to_sparse()), "is not a plain tensor"),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_folder_is_one_sentence_and_the_model_stays_as_it_was(problem, tmp_path):
    folder = tmp_path / "saved"
    write(folder)
    spoil, message = BAD[problem]
    spoil(folder)
    base = make("llama")
    hooks = hooks_on(base)
    for load in (pyreft.load, checkpoint_into_reft_model):
        with pytest.raises(pyreft.CheckpointError, match=message) as caught:
            load(folder, base)
        assert "\n" not in str(caught.value)
    assert not (folder / "executed").exists()
    assert hooks == hooks_on(base)
    assert not any("reft" in m._modules for m in base.modules())
    held = pyreft.get_reft_model(base, representations_of(LAYERS))
    before = {name: p.clone() for name, p in held.named_parameters()}
    with pytest.raises(pyreft.CheckpointError):
        held.load_intervention(folder)
    assert all(torch.equal(before[name], p) for name, p in held.named_parameters())


def representations_of(layers):
    return pyreft.ReftConfig([{"layer": i, "intervention": m} for i, m in enumerate(interventions("loreft", layers))])


def checkpoint_into_reft_model(folder, base):
    if not folder.exists():  # pyreft then asks the hub
        checkpoint.find(folder)
    return pyreft.ReftModel.load(folder, base)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    write(tmp_path, d=2 * WIDTH)
    with pytest.raises(ValueError, match="was made for a hidden size of 64; this LlamaForCausalLM has 32"):
        pyreft.load(tmp_path, make("llama"))
    write(tmp_path / "path", places=[(0, "roberta.encoder.layer[0].output")])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no such module"):
        pyreft.load(tmp_path / "path", make("llama"))
    as_trainers(tmp_path / "path")
    with pytest.raises(ValueError, match="which LlamaForCausalLM does not have"):
        pyreft.load(tmp_path / "path", make("llama"))


def test_a_thousand_mutated_files(tmp_path):
    """Each is refused with our error or is a sound intervention; nothing else comes out, and nothing is run or written."""
    rng = random.Random(0)
    made = {kind: INTERVENTIONS[kind](embed_dim=6, low_rank_dimension=2) for kind in INTERVENTIONS}
    whole = {}
    for kind, intervention in made.items():
        torch.save(format.to_tensors(intervention), tmp_path / "file.bin")
        whole[kind] = (tmp_path / "file.bin").read_bytes()
    messages = []
    for i in range(1000):
        kind = list(made)[i % len(made)]
        data = bytearray(whole[kind])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            choice = rng.randrange(4)
            if choice == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif choice == 1:
                data[at : at + rng.randint(1, 64)] = rng.randbytes(rng.randint(0, 64))
            elif choice == 2:
                del data[at:]
                data = data or bytearray(b"x")
            else:
                data = data[:at] + data[rng.randrange(len(data)) :] or bytearray(b"x")
        path = tmp_path / "mutated.bin"
        path.write_bytes(data)
        try:
            read = format.to_intervention(format.read_tensors(path), "it", kind)
        except pyreft.CheckpointError as error:
            messages.append(str(error))
            continue
        assert all(bool(torch.isfinite(p).all()) for p in read.parameters())
        assert isinstance(read, nn.Module)
    assert len(messages) > 500
    assert not any("\n" in message for message in messages)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.bin", "mutated.bin"]
