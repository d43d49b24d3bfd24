"""pyreft's own files and outputs: the same logits, text, gradients and bits from ours."""

from __future__ import annotations

import oracles
import pytest
import torch

from fastreft import pyreft
from fastreft.interventions import INTERVENTIONS
from fastreft.pyreft import checkpoint, format

CLASSES = ("Loreft", "Noreft", "Consreft", "Lobireft", "Direft", "Nodireft")


@pytest.fixture(scope="module", params=[(k, v) for k in oracles.KINDS for v in oracles.VARIANTS], ids="-".join)
def case(request):
    """(kind, variant, the oracle's data, its fp32 results)."""
    kind, variant = request.param
    data = oracles.io(kind)
    return kind, variant, data, data[f"{variant}_float32"]


def as_adapter(kind, variant):
    two_sided = {"positions": "f3+l3"} if variant != "shared" else {"positions": "f2+l3"}
    return pyreft.load(oracles.folder(kind, variant), oracles.base_model(kind), **two_sided)


def test_an_adapter_gives_pyrefts_logits_and_text(case):
    kind, variant, data, wanted = case
    model = as_adapter(kind, variant)
    with torch.no_grad():
        logits = model(**oracles.inputs(data), reft_positions=oracles.columns(wanted, variant)).logits
    torch.testing.assert_close(oracles.shown(logits, data), oracles.shown(wanted["logits"], data), rtol=0, atol=5e-6)
    if kind == "llama":
        text = model.generate(
            **oracles.inputs(data),
            reft_positions=oracles.columns(wanted, variant),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        assert torch.equal(text, wanted["generate_prompt"])


@pytest.mark.parametrize("kind", oracles.KINDS)
@pytest.mark.parametrize("variant", ["shared", "split"])
def test_positions_find_the_oracles_tokens_without_being_told(kind, variant):
    data = oracles.io(kind)
    wanted = data[f"{variant}_float32"]
    model = as_adapter(kind, variant)
    with torch.no_grad():
        logits = model(**oracles.inputs(data)).logits  # padding left or right, from the mask
    torch.testing.assert_close(oracles.shown(logits, data), oracles.shown(wanted["logits"], data), rtol=0, atol=5e-6)


def test_a_reft_model_gives_pyrefts_logits_loss_gradients_and_text(case):
    kind, variant, data, wanted = case
    model = pyreft.ReftModel.load(oracles.folder(kind, variant), oracles.base_model(kind))
    assert list(model.interventions) == wanted["key_order"]
    where = {"sources->base": (None, wanted["unit_locations"])}
    none, output = model(oracles.inputs(data), unit_locations=where, labels=data["labels"])
    assert none is None
    torch.testing.assert_close(
        oracles.shown(output.logits, data), oracles.shown(wanted["logits"], data), rtol=0, atol=5e-6
    )
    torch.testing.assert_close(output.loss, wanted["loss"], rtol=0, atol=1e-6)
    output.loss.backward()
    # A position listed twice counts once: the oracle of plain hooks, where pyreft's own gradient is off.
    for key, intervention in model.interventions.items():
        for ours, theirs in (("W", "learned_source.weight"), ("b", "learned_source.bias")):
            grad = wanted["grads_masked_reference"][f"{key}.{theirs}"]
            torch.testing.assert_close(getattr(intervention, ours).grad, grad, rtol=1e-4, atol=1e-6)
    if kind == "llama":
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        base, text = model.generate(
            oracles.inputs(data),
            unit_locations=where,
            intervene_on_prompt=True,
            output_original_output=True,
            **options,
        )
        assert torch.equal(base, wanted["base_generate"])
        assert torch.equal(text, wanted["generate_prompt"])
        if "generate_every_new_token" in wanted:
            _, text = model.generate(oracles.inputs(data), **options)
            assert torch.equal(text, wanted["generate_every_new_token"])


def test_the_base_model_alone_is_not_edited(case):
    kind, variant, data, _ = case
    base = oracles.base_model(kind)
    model = pyreft.ReftModel.load(oracles.folder(kind, variant), base)
    with torch.no_grad():
        assert torch.equal(base(**oracles.inputs(data)).logits, model.model(**oracles.inputs(data)).logits)
        torch.testing.assert_close(base(**oracles.inputs(data)).logits, data["base_logits_float32"], rtol=0, atol=5e-6)


def test_files_come_back_bit_for_bit(case, tmp_path):
    kind, variant, _, _ = case
    source = oracles.folder(kind, variant)
    if variant != "dup":
        pyreft.save(as_adapter(kind, variant), tmp_path / "from_adapter")
    pyreft.ReftModel.load(source, oracles.base_model(kind)).save(tmp_path / "from_model")
    for made in tmp_path.iterdir():
        assert {file.name for file in made.iterdir()} == {file.name for file in source.iterdir()}
        for file in source.glob("*.bin"):
            theirs, ours = format.read_tensors(file), format.read_tensors(made / file.name)
            assert list(theirs) == list(ours)
            assert all(torch.equal(theirs[name], ours[name]) and ours[name].is_contiguous() for name in theirs)
        written, settings = (checkpoint.json.loads((at / "config.json").read_text()) for at in (made, source))
        settings.pop("transformers_version")
        assert written == settings


def test_float64_logits():
    data = oracles.io("llama")
    wanted = data["shared_float64"]
    folder, base = oracles.folder("llama", "shared"), oracles.base_model("llama", torch.float64)
    model = pyreft.ReftModel.load(folder, base, dtype=torch.float64)
    with torch.no_grad():
        for key, intervention in model.interventions.items():
            intervention.R.copy_(wanted["R"][key].T)  # the file's R was rounded to fp32
        _, output = model(oracles.inputs(data), unit_locations={"sources->base": (None, wanted["unit_locations"])})
    torch.testing.assert_close(
        oracles.shown(output.logits, data), oracles.shown(wanted["logits"], data), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_from_its_file_gives_pyrefts_output(name):
    kind = name.lower()
    for case in oracles.read(oracles.INTERVENTIONS / f"{name}.pt"):
        state, dtype = case["pyreft_state_dict"], getattr(torch, case["dtype"].removeprefix("torch."))
        made = format.to_intervention(state, name, kind, dtype=dtype, act_fn=case["act_fn"])
        assert (made.embed_dim, made.r) == (case["d"], case["r"])
        if "R" in case and made.orthonormal:
            torch.testing.assert_close(made.R, case["R"].T.to(made.R.dtype), rtol=0, atol=3e-7)
        out = made(case["h"])
        rounding = (4 if dtype is torch.bfloat16 else 16) * torch.finfo(dtype).eps
        torch.testing.assert_close(out, case["out"], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_goes_back_into_pyrefts_tensors(name):
    for case in oracles.read(oracles.INTERVENTIONS / f"{name}.pt"):
        if "float32" not in case["dtype"]:
            continue
        state = case["pyreft_state_dict"]
        made = format.to_intervention(state, name, name.lower(), act_fn=case["act_fn"])
        back = format.to_tensors(made)
        assert {key: tuple(value.shape) for key, value in back.items()} == {
            key: tuple(value.shape) for key, value in state.items()
        }
        again = format.to_intervention(back, name, name.lower(), act_fn=case["act_fn"])
        for key, parameter in made.named_parameters():
            exact = key != "R" or name == "Loreft"
            torch.testing.assert_close(again.get_parameter(key), parameter, rtol=0, atol=0 if exact else 3e-7)
        for key in back.keys() - {"rotate_layer"}:
            if not key.startswith("rotate_layer."):
                assert torch.equal(back[key], state[key]), key


def test_every_class_is_in_the_table():
    assert sorted(INTERVENTIONS) == sorted(name.lower() for name in CLASSES)
