"""pyreft's folders in all their layouts, read and written."""

from __future__ import annotations

import json

import pytest
import torch
from drop_in import R, as_trainers, interventions, write
from tiny import WIDTH, batch, logits, make

from fastreft import ReftConfig, get_reft_model, pyreft
from fastreft.interventions import INTERVENTIONS
from fastreft.pyreft import checkpoint, format
from fastreft.pyreft.checkpoint import Entry


def in_old_style(folder):
    """The file names of pyvene up to 0.1.6, and representations of 13 fields."""
    settings = json.loads((folder / "config.json").read_text())
    settings["representations"] = [fields[:13] for fields in settings["representations"]]
    old = checkpoint.keys([tuple(fields[:2]) for fields in settings["representations"]], ".")
    for key, older in zip(settings["sorted_keys"], old, strict=True):
        (folder / f"intkey_{key}.bin").rename(folder / f"intkey_{older}.bin")
    settings["sorted_keys"] = old
    (folder / "config.json").write_text(json.dumps(settings))


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


@pytest.mark.parametrize("positions", ["d3", "1:"])
def test_positions_that_pyreft_has_no_like_of_are_refused(tmp_path, positions):
    model = get_reft_model(make("llama"), ReftConfig(positions=positions))
    with pytest.raises(
        ValueError, match=f"positions is '{positions}', tokens counted over what is written, which pyreft"
    ):
        pyreft.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_has_no_orthonormal_equal_says_so():
    for kind, settings in (("consreft", {}), ("loreft", {"act_fn": "relu"})):
        made = interventions(kind, 1, **settings)[0]
        with torch.no_grad():
            made.R.mul_(2)
        with pytest.raises(ValueError, match="has no equal with orthonormal rows"):
            format.orthonormalise_(made)


# ---- writing ---------------------------------------------------------------------------------------------------------


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
