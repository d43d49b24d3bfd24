"""One intervention for each position: tied="position"."""

import json
from contextlib import ExitStack, contextmanager

import pytest
import torch
from peft import PeftConfig, PeftModel
from tiny import WIDTH, batch, blocks, columns, hooked, logits, make

from fastreft import ReftAdamW, ReftConfig, get_reft_model, param_groups, pyreft
from fastreft.cli import main
from fastreft.tasks.flags.train import parse
from fastreft.tasks.train import settings

OWN = dict(positions="f2+l3", tied="position")


def own(kind="llama", **config):
    return get_reft_model(make(kind), ReftConfig(**(OWN | config)))


def held(model, adapter="default"):
    """Layer -> its interventions, by place."""
    return [block.reft.interventions(adapter) for block in blocks(model)]


def by_place(mask, first, last, compat=False, labels=None):
    """Sample by sample, column -> place; the k-th from the start has place k, the k-th from the end the k-th last."""
    found = []
    for b, row in enumerate(mask.tolist()):
        prompt = [
            s for s, seen in enumerate(row) if seen and (labels is None or s < int((labels[b] != -100).nonzero()[0]))
        ]
        half = len(prompt) // 2
        f, m = min(first, half), min(last, half if compat else len(prompt) - half)
        if not compat and not (first and last):
            f, m = min(first, len(prompt)), min(last, len(prompt))
        places = {s: k for k, s in enumerate(prompt[:f])}
        found.append(places | {s: first + last - 1 - k for k, s in enumerate(prompt[::-1][:m])})
    return found


@contextmanager
def repeated(model, kind, chosen):
    """Within it a plain model whose blocks are edited by the reference, place after place."""
    plain, layers = make(kind), held(model)
    with ExitStack() as stack:
        for place in range(len(layers[0])):
            weights = {
                i: tuple(layer[place].weights()[k].detach() for k in (0, 1, 3)) for i, layer in enumerate(layers)
            }
            at_place = [[s for s, p in sample.items() if p == place] for sample in chosen]
            stack.enter_context(hooked(plain, weights, at_place))
        yield plain


def expected(model, kind, inputs, chosen):
    with repeated(model, kind, chosen) as plain:
        return logits(plain, inputs)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize(("first", "last"), [(2, 3), (3, 0), (0, 2), (5, 5)])
def test_each_position_is_edited_by_its_own_intervention(kind, side, compat, first, last):
    text = "+".join(part for part in (f"f{first}" if first else "", f"l{last}" if last else "") if part)
    inputs = batch(side, lengths=(7, 4, 9, 1, 2))
    model = own(kind, positions=text, pyreft_compat=compat)
    assert [len(layer) for layer in held(model)] == [first + last] * len(blocks(model))
    before = logits(model, inputs)
    chosen = by_place(inputs["attention_mask"], first, last, compat)
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(before[shown], expected(model, kind, inputs, chosen)[shown])
    other = [{s: (p + 1) % (first + last) for s, p in sample.items()} for sample in chosen]
    assert not torch.allclose(before[shown], expected(model, kind, inputs, other)[shown])


def test_explicit_positions_are_a_group_each():
    inputs = batch("left")
    model = own()
    chosen = columns(inputs["attention_mask"], 2, 3)
    chosen[1] = [chosen[1][0], chosen[1][1], -1, *chosen[1][2:]]  # four tokens have no third from the end
    given = torch.tensor(chosen).T[..., None]
    assert given.shape == (5, 3, 1)
    assert torch.equal(logits(model, inputs), logits(model, inputs | {"reft_positions": given}))
    for wrong in (given[:2], given[:, :, 0].T):
        with pytest.raises(ValueError, match=r"with tied='position' it must be \(5, batch, n\), the positions of each"):
            model(**inputs, reft_positions=wrong)


def test_gradients_reach_exactly_the_used_ones():
    inputs = batch("left", lengths=(3, 2), length=5)
    labels = inputs["input_ids"].masked_fill(torch.arange(5) < 4, -100)  # prompts of 2 and 1 tokens
    model = own()
    model(**inputs, labels=labels).loss.backward()
    used = {place for sample in by_place(inputs["attention_mask"], 2, 3, labels=labels) for place in sample.values()}
    assert used == {0, 4}
    *inner, last = held(model)
    for layer in inner:
        assert {place for place, m in enumerate(layer) if bool(m.b.grad.any())} == used
        assert {place for place, m in enumerate(layer) if bool(m.R.grad.any())} == used
    assert {place for place, m in enumerate(last) if bool(m.b.grad.any())} == {4}  # the loss is of the token after it


def test_training_moves_the_used_ones_and_keeps_all_orthonormal():
    inputs = batch("left", lengths=(3, 3), length=5)
    labels = inputs["input_ids"].masked_fill(torch.arange(5) < 4, -100)
    model = own(r=3)
    before = [[m.W.detach().clone() for m in layer] for layer in held(model)]
    optimizer = ReftAdamW(param_groups(model, lr=1e-2))
    for _ in range(5):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for i, (layer, old) in enumerate(zip(held(model), before, strict=True)):
        moved = [not torch.equal(m.W, W) for m, W in zip(layer, old, strict=True)]
        assert moved == [i < 2, False, False, False, True]  # the loss is of the token after the last
        for m in layer:
            torch.testing.assert_close(m.R @ m.R.T, torch.eye(3))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 1}, {"prefill_chunk_size": 4}, {"num_beams": 3}])
def test_generation(kind, how):
    inputs, model = batch("left", lengths=(7, 4, 9, 2)), own(kind)
    with torch.no_grad():  # a large edit, so that one too many or too few would show
        for layer in held(model):
            for m in layer:
                m.b.normal_().mul_(3)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    beams = {"num_beams": how.get("num_beams", 1)}
    chosen = [sample for sample in by_place(inputs["attention_mask"], 2, 3) for _ in range(beams["num_beams"])]
    with repeated(model, kind, chosen) as plain:
        wanted = plain.generate(**inputs, **settings, **beams, use_cache=False)
    bare = make(kind).generate(**inputs, **settings, **beams, use_cache=False)
    assert torch.equal(model.generate(**inputs, **settings, **how), wanted)
    assert not torch.equal(bare, wanted)


@pytest.mark.parametrize("name", ["default", "7", "other"])
def test_save_and_load_give_the_same_bits(name, tmp_path):
    config = ReftConfig(task_type="CAUSAL_LM", **OWN, act_fn="prelu", layers_to_transform=[0, 2])
    model = get_reft_model(make("llama"), config, adapter_name=name)
    inputs = batch("left")
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    assert json.loads((folder / "adapter_config.json").read_text())["tied"] == "position"
    assert PeftConfig.from_pretrained(folder).tied == "position"
    for adapter in ("default", "7", "third"):
        again = PeftModel.from_pretrained(make("llama"), folder, adapter_name=adapter)
        assert torch.equal(logits(again, inputs), logits(model, inputs))
        keys = {key.replace(f".reft_edit.{name}.", f".reft_edit.{adapter}.") for key in model.state_dict()}
        assert again.state_dict().keys() == keys
    shared = get_reft_model(make("llama"), ReftConfig(positions="f2+l3", layers_to_transform=[0, 2], act_fn="prelu"))
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"tied": True}))
    with pytest.raises(ValueError, match="does not fit this LlamaForCausalLM: it holds weights for 2 blocks"):
        shared.load_adapter(folder, "wrong")


def test_several_adapters_beside_each_other():
    inputs = batch("left")
    model = own()
    model.add_adapter("shared", ReftConfig(positions="f2+l3"))
    model.add_adapter("sides", ReftConfig(positions="f2+l3", tied=False))
    names = {"default": 5, "shared": 1, "sides": 2}
    assert {name: len(held(model, name)[0]) for name in names} == names
    seen = {}
    for name in names:
        model.set_adapter(name)
        for other in names:
            trains = {p.requires_grad for m in held(model, other)[0] for p in m.parameters()}
            assert trains == {other == name}
        seen[name] = logits(model, inputs)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model, inputs), logits(make("llama"), inputs), rtol=0, atol=0)
    assert not torch.equal(seen["default"], seen["shared"])
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), seen["default"])
    model.delete_adapter("default")
    assert held(model) == [[], [], []]
    assert not any(".default." in key for key in model.state_dict())
    model.set_adapter("sides")
    assert torch.equal(logits(model, inputs), seen["sides"])


def test_number_of_parameters_and_where_they_are(tmp_path, capsys):
    model = own(r=2)
    assert model.get_nb_trainable_parameters()[0] == 3 * 5 * (2 * 2 * WIDTH + 2)
    model.save_pretrained(tmp_path)
    assert main(["inspect", "--path", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "tied position" in shown
    lines = [line.split() for line in shown.splitlines() if "loreft" in line and line.startswith("  ")]
    assert len(lines) == 15
    assert {line[1] for line in lines} == {f"({place})" for place in range(5)}
    assert {line[-2] for line in lines} == {str(2 * 2 * WIDTH + 2)}


def test_it_is_saved_for_pyreft_as_so_many_interventions(tmp_path):
    model = own(positions="f1+l1")
    pyreft.convert.save(model, tmp_path)
    rows = pyreft.checkpoint.read(str(tmp_path))
    assert [entry.layer for entry in rows] == [0, 1, 2] * 2
    for place in range(2):
        for layer, entry in zip(held(model), rows[3 * place : 3 * place + 3], strict=True):
            assert torch.equal(entry.intervention.W, layer[place].W)


@pytest.mark.parametrize("given", [["--tied", "position"], ["--tied=position"]])
def test_the_command_line_takes_it(given, tmp_path):
    base = ["--model", "embedded", "--train_file", __file__, "--output_dir", str(tmp_path)]
    assert settings(parse([*base, *given])).adapter["tied"] == "position"


def test_the_command_line_still_takes_yes_and_no(tmp_path):
    base = ["--model", "embedded", "--train_file", __file__, "--output_dir", str(tmp_path)]
    assert settings(parse(base)).adapter["tied"] is True
    for word, wanted in (("false", False), ("False", False), ("no", False), ("true", True), ("1", True)):
        assert settings(parse([*base, "--tied", word])).adapter["tied"] is wanted
    for value in ("position", False, True):
        (tmp_path / "c.yaml").write_text(f"tied: {json.dumps(value)}\n")
        assert settings(parse([*base, "--config", str(tmp_path / "c.yaml")])).adapter["tied"] == value


@pytest.mark.parametrize("positions", ["prompt", "all", "decode", "d3", "2:5"])
def test_positions_without_a_number_are_refused(positions):
    with pytest.raises(ValueError, match=f"tied is 'position' and positions '{positions}', which is no fixed number"):
        ReftConfig(positions=positions, tied="position")


@pytest.mark.parametrize("tied", ["positions", None, "side", 2])
def test_another_word_is_refused(tied):
    with pytest.raises(ValueError, match=r"tied is .*; it must be True, False or 'position'"):
        ReftConfig(tied=tied)
