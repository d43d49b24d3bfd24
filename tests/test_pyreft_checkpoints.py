"""pyreft's folders in all their layouts, and whatever is wrong with one: one sentence, and the model as it was."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
import torch
from tiny import LAYERS, WIDTH, batch, logits, make
from torch import nn

from fastreft import pyreft
from fastreft.interventions import INTERVENTIONS
from fastreft.pyreft import checkpoint, format
from fastreft.pyreft.checkpoint import Entry

R = 3


def interventions(kind, count, d=WIDTH, **settings):
    torch.manual_seed(7)
    return [INTERVENTIONS[kind](embed_dim=d, low_rank_dimension=R, **settings) for _ in range(count)]


def write(folder, kind="loreft", places=None, **settings):
    """A checkpoint with an intervention at each (layer, component), and the interventions."""
    places = places or [(layer, "block_output") for layer in range(LAYERS)]
    made = interventions(kind, len(places), **settings)
    checkpoint.write(folder, [Entry(*place, m) for place, m in zip(places, made, strict=True)])
    return made


def in_old_style(folder):
    """The file names of pyvene up to 0.1.6, and representations of 13 fields."""
    settings = json.loads((folder / "config.json").read_text())
    settings["representations"] = [fields[:13] for fields in settings["representations"]]
    old = checkpoint.keys([tuple(fields[:2]) for fields in settings["representations"]], ".")
    for key, older in zip(settings["sorted_keys"], old, strict=True):
        (folder / f"intkey_{key}.bin").rename(folder / f"intkey_{older}.bin")
    settings["sorted_keys"] = old
    (folder / "config.json").write_text(json.dumps(settings))


def as_trainers(folder):
    """A trainer's checkpoint: no config.json, a file for the base model's weights, one folder further in."""
    inner = folder / "intervenable_model"
    inner.mkdir()
    for file in folder.glob("intkey_*"):
        file.rename(inner / file.name)
    (folder / "config.json").unlink()
    torch.save({}, inner / "pytorch_model.bin")


STYLES = {"now": lambda folder: None, "old": in_old_style, "trainer": as_trainers}


@pytest.mark.parametrize("kind", INTERVENTIONS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_class_in_every_style_and_dtype(kind, style, dtype, tmp_path):
    with torch.no_grad():
        made = write(tmp_path, kind, dtype=dtype)
    STYLES[style](tmp_path)
    model = pyreft.load(tmp_path, make("llama"), positions="f2+l2", intervention_type=kind)
    layers = [block.reft.reft_edit["default"] for block in model.get_base_model().model.layers]
    for held, wanted in zip(layers, made, strict=True):
        assert format.kind_of(held) == kind
        for name, parameter in held.named_parameters():
            assert parameter.dtype == torch.float32  # bf16 widens exactly
            if name == "R" and kind != "loreft":  # through a (d, d) base
                torch.testing.assert_close(parameter, wanted.R, rtol=0, atol=3e-7)
            else:
                assert torch.equal(parameter, getattr(wanted, name).float())
    narrow = pyreft.load(tmp_path, make("llama"), intervention_type=kind, dtype=dtype)
    first = narrow.get_base_model().model.layers[0].reft.reft_edit["default"]
    assert first.R.dtype == torch.float32 if first.orthonormal else first.P.dtype == dtype
    assert getattr(first, "W", first.b).dtype == (dtype if hasattr(first, "W") else torch.float32)


def test_the_kind_is_told_from_the_file_or_asked_for(tmp_path):
    for kind, asked in {
        "loreft": None,
        "direft": None,
        "consreft": "'consreft' or 'lobireft'",
        "noreft": "'noreft' or 'nodireft'",
    }.items():
        folder = tmp_path / kind
        folder.mkdir()
        write(folder, kind)
        as_trainers(folder)
        if asked:
            with pytest.raises(ValueError, match=f"no config.json says which: give intervention_type={asked}"):
                pyreft.load(folder, make("llama"))
        model = pyreft.load(folder, make("llama"), intervention_type=kind if asked else None)
        assert model.peft_config["default"].intervention_type == kind


@pytest.mark.parametrize("style", STYLES)
def test_split_layers_become_prefix_and_suffix(style, tmp_path):
    made = write(tmp_path, places=[(0, "block_output"), (2, "block_output")] * 2)
    STYLES[style](tmp_path)
    model = pyreft.load(tmp_path, make("llama"), positions="f2+l2")
    config = model.peft_config["default"]
    assert (config.tied, config.layers_to_transform, config.pyreft_compat) == (False, [0, 2], True)
    blocks = model.get_base_model().model.layers
    for layer, prefix, suffix in ((0, made[0], made[2]), (2, made[1], made[3])):
        assert torch.equal(blocks[layer].reft.reft_edit["default"].W, prefix.W)
        assert torch.equal(blocks[layer].reft.reft_suffix["default"].W, suffix.W)
    with pytest.raises(ValueError, match=r"positions is 'l2'; this checkpoint has one intervention for the prefix"):
        pyreft.load(tmp_path, make("llama"), positions="l2")


@pytest.mark.parametrize("style", STYLES)
def test_string_components(style, tmp_path):
    made = write(tmp_path, places=[(i, f"model.layers[{i}].mlp.output") for i in (0, 2)])
    STYLES[style](tmp_path)
    model = pyreft.load(tmp_path, make("llama"))
    assert sorted(model.peft_config["default"].target_modules) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert torch.equal(model.get_base_model().model.layers[2].mlp.reft.reft_edit["default"].W, made[1].W)
    (tmp_path / "back").mkdir()
    pyreft.save(model, tmp_path / "back")
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    # In the words that pyreft's load knows for this model: it cannot tell the width of a path.
    assert [fields[:2] for fields in settings["representations"]] == [[0, "mlp_output"], [2, "mlp_output"]]
    again = pyreft.load(tmp_path / "back", make("llama"))
    assert torch.equal(logits(again, batch()), logits(model, batch()))


def test_a_model_that_pyvene_does_not_know_is_written_with_paths(tmp_path):
    write(tmp_path, places=[(1, "bert.encoder.layer[1].output"), (1, "bert.encoder.layer[1].attention.output")])
    pyreft.save(pyreft.load(tmp_path, make("bert-cls")), tmp_path / "back")
    listed = json.loads((tmp_path / "back" / "config.json").read_text())["representations"]
    assert {fields[1] for fields in listed} == {
        "bert.encoder.layer[1].output",
        "bert.encoder.layer[1].attention.output",
    }


def test_layouts_that_one_adapter_cannot_hold_load_as_a_reft_model(tmp_path):
    places = [(0, "block_output"), (0, "block_output"), (0, "block_output"), (1, "block_input"), (2, "mlp_output")]
    write(tmp_path, places=places)
    with pytest.raises(
        ValueError, match=r"model.layers.0 has more than two interventions; use fastreft.pyreft.ReftModel.load"
    ):
        pyreft.load(tmp_path, make("llama"))
    model = pyreft.ReftModel.load(tmp_path, make("llama"))
    assert len(model.interventions) == 5
    model.save(tmp_path / "again")
    for file in tmp_path.glob("*.bin"):
        ours, theirs = format.read_tensors(file), format.read_tensors(tmp_path / "again" / file.name)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for sub, places, message in (
        (
            "input",
            [(1, "mlp_input")],
            "an adapter edits outputs, and blocks' inputs: use fastreft.pyreft.ReftModel.load",
        ),
        ("both", [(0, "block_input"), (1, "block_output")], "some interventions edit outputs and some inputs"),
        ("odd", [(0, "block_output"), (1, "block_output"), (1, "block_output")], "some places have one intervention"),
    ):
        (tmp_path / sub).mkdir()
        write(tmp_path / sub, places=places)
        with pytest.raises(ValueError, match=message):
            pyreft.load(tmp_path / sub, make("llama"))


def test_block_inputs_become_the_component(tmp_path):
    write(tmp_path / "theirs", places=[(0, "block_input"), (2, "block_input")])
    model = pyreft.load(tmp_path / "theirs", make("llama"))
    config = model.peft_config["default"]
    assert (config.component, config.layers_to_transform) == ("block_input", [0, 2])
    pyreft.save(model, tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()
    theirs, inputs = pyreft.ReftModel.load(tmp_path / "theirs", make("llama")), batch("left")
    with torch.no_grad():
        wanted = theirs(inputs, unit_locations={"base": 8})[1].logits
    torch.testing.assert_close(logits(model, inputs), wanted, rtol=1e-5, atol=1e-6)


def test_one_more_adapter_on_a_peft_model(tmp_path):
    write(tmp_path)
    model = pyreft.load(tmp_path, make("llama"))
    pyreft.load(tmp_path, model, positions="f3", adapter_name="other")
    assert set(model.peft_config) == {"default", "other"}
    held = model.get_base_model().model.layers[0].reft.reft_edit
    assert torch.equal(held["other"].W, held["default"].W)
    assert held["default"].W.requires_grad
    assert not held["other"].W.requires_grad


def test_an_adapter_is_saved_and_reloaded_by_peft(tmp_path):
    write(tmp_path / "theirs", "noreft", add_bias=True)
    model = pyreft.load(tmp_path / "theirs", make("llama"), positions="f1+l2", act_fn="relu")
    model.save_pretrained(tmp_path / "ours")
    again = pyreft.convert.PeftModel.from_pretrained(make("llama"), tmp_path / "ours")
    assert torch.equal(logits(again, batch()), logits(model, batch()))


# ---- an R that is no longer orthonormal ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loreft", "direft", "lobireft"])
def test_a_drifted_rotation_is_kept_with_a_warning_or_made_orthonormal_with_the_same_edit(kind, tmp_path):
    made = interventions(kind, 1)[0].double()
    with torch.no_grad():
        made.R.add_(0.1 * torch.randn_like(made.R))
    h = torch.randn(5, WIDTH, dtype=torch.float64)
    fixed = INTERVENTIONS[kind](embed_dim=WIDTH, low_rank_dimension=R).double()
    fixed.load_state_dict(made.state_dict())
    format.orthonormalise_(fixed)
    assert format.orthonormality_error(made) > 0.01
    assert format.orthonormality_error(fixed) < 1e-12
    torch.testing.assert_close(fixed(h), made(h), rtol=1e-9, atol=1e-9)
    if kind == "loreft":
        checkpoint.write(tmp_path, [Entry(0, "block_output", made.float())])
        with pytest.warns(UserWarning, match="1 of the 1 interventions .* rows are not orthonormal"):
            kept = pyreft.load(tmp_path, make("llama"))
        assert torch.equal(kept.get_base_model().model.layers[0].reft.reft_edit["default"].R, made.R.float())
        whole = pyreft.load(tmp_path, make("llama"), orthonormalise=True)
        assert format.orthonormality_error(whole.get_base_model().model.layers[0].reft.reft_edit["default"]) < 1e-6
        torch.testing.assert_close(logits(whole, batch()), logits(kept, batch()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "twin"), [("noreft", "loreft"), ("nodireft", "direft")])
@pytest.mark.parametrize("add_bias", [False, True])
def test_an_edit_without_R_is_saved_as_its_twin_with_one(kind, twin, add_bias, tmp_path):
    made = interventions(kind, 1, add_bias=add_bias)[0].double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    h = torch.randn(5, WIDTH, dtype=torch.float64)
    same = format.orthonormal_twin(made)
    assert format.kind_of(same) == twin
    assert format.orthonormality_error(same) < 1e-12
    torch.testing.assert_close(same(h), made(h), rtol=1e-9, atol=1e-9)
    checkpoint.write(tmp_path, [Entry(0, "block_output", made.float())])
    model = pyreft.load(tmp_path, make("llama"))
    for keep_type, wanted in ((False, twin), (True, kind)):
        pyreft.save(model, tmp_path / wanted, keep_type=keep_type)
        again = pyreft.load(tmp_path / wanted, make("llama"))
        assert again.peft_config["default"].intervention_type == wanted
        torch.testing.assert_close(logits(again, batch()), logits(model, batch()), rtol=1e-4, atol=1e-4)


def test_an_activation_that_pyrefts_files_cannot_hold_is_a_warning(tmp_path):
    write(tmp_path, "noreft")
    model = pyreft.load(tmp_path, make("llama"), act_fn="relu")
    with pytest.warns(UserWarning, match="act_fn is 'relu', which pyreft's files have no place for"):
        pyreft.save(model, tmp_path / "back")
    assert "NoreftIntervention" in (tmp_path / "back" / "config.json").read_text()
    with pytest.raises(ValueError, match="has no equal with an orthonormal R"):
        format.orthonormal_twin(interventions("noreft", 1, act_fn="relu")[0])


def test_what_has_no_orthonormal_equal_says_so():
    for kind, settings in (("consreft", {}), ("loreft", {"act_fn": "relu"})):
        made = interventions(kind, 1, **settings)[0]
        with torch.no_grad():
            made.R.mul_(2)
        with pytest.raises(ValueError, match="has no equal with orthonormal rows"):
            format.orthonormalise_(made)


# ---- bad folders ---------------------------------------------------------------------------------------------------


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
    "a subspace": (represent(7, [[0, 1]]), "subspaces, linked interventions and sources are not supported"),
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
    "integers": (tensor("weight", lambda t: t.int()), "W .* holds values that are not finite"),
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
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    for load in (pyreft.load, checkpoint_into_reft_model):
        with pytest.raises(pyreft.CheckpointError, match=message) as caught:
            load(folder, base)
        assert "\n" not in str(caught.value)
    assert not (folder / "executed").exists()
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
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


def test_saving_over_another_checkpoint_leaves_none_of_it(tmp_path):
    write(tmp_path, places=[(layer, "block_output") for layer in (0, 1, 2)] * 2)
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path, places=[(1, "block_output")])
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin",
        "notes.txt",
    ]


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, "noreft")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_save_wants_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="this LlamaForCausalLM has no such ReFT adapter"):
        pyreft.save(make("llama"), tmp_path)
    write(tmp_path / "a")
    model = pyreft.load(tmp_path / "a", make("llama"))
    with pytest.raises(ValueError, match="adapter_name is 'other'"):
        pyreft.save(model, tmp_path, adapter_name="other")


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
