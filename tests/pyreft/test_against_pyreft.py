"""fastreft.pyreft beside the real pyreft: the same data, positions and results, and files that it loads."""

from __future__ import annotations

import copy

import oracles
import pytest
import torch
from tiny import LAYERS, WIDTH, batch, make

theirs = pytest.importorskip("pyreft.reft_model", reason="pyreft is not installed: make test-pyreft")
import datasets  # noqa: E402
import pyreft  # noqa: E402

import fastreft.pyreft as ours  # noqa: E402
from fastreft.interventions import INTERVENTIONS  # noqa: E402
from fastreft.pyreft import checkpoint, format  # noqa: E402
from fastreft.pyreft.checkpoint import Entry  # noqa: E402
from fastreft.tasks.models import load_tokenizer  # noqa: E402

WHERE = {"sources->base": (None, [[[2, 8], [5, 8], [0, 8]]] * LAYERS)}
PROMPTS, ANSWERS = ["The king said:", "Once upon a time there was an old fox.", "Why?"], [" no", " It slept.", " So."]


@pytest.fixture(scope="module")
def tokenizer():
    made = load_tokenizer("embedded")
    made.model_max_length = 256
    return made


def same_rows(mine, other):
    for one, two in zip(mine, other, strict=True):
        for name in ("input_ids", "labels", "intervention_locations", "attention_mask"):
            assert (name in one) == (name in two)
            if name in one:
                assert torch.as_tensor(one[name]).tolist() == torch.as_tensor(two[name]).tolist(), name


@pytest.mark.parametrize("nonstop", [False, True])
def test_data_modules(nonstop, tokenizer):
    one, two = (
        api.make_last_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS, 2, nonstop=nonstop)
        for api in (ours, pyreft)
    )
    same_rows(one["train_dataset"], two["train_dataset"])
    batches = [made["data_collator"]([made["train_dataset"][i] for i in range(3)]) for made in (one, two)]
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    for share in (False, True):
        options = {"positions": "f2+l3", "num_interventions": 4, "share_weights": share, "nonstop": nonstop}
        one, two = (
            api.make_multiple_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS, **options)
            for api in (ours, pyreft)
        )
        same_rows(one["train_dataset"], two["train_dataset"])


def test_data_sets(tokenizer):
    records = datasets.Dataset.from_list(
        [
            {"instruction": p, "input": "" if i else "x", "output": a}
            for i, (p, a) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
        ]
    )
    common = {"dataset": records, "position": "f2+l2", "num_interventions": 2}
    fields = {
        "ReftSupervisedDataset": {"instruction_field": "instruction", "input_field": "input", "output_field": "output"},
        "ReftRawDataset": {},
    }
    for name, more in fields.items():
        one, two = (getattr(api, name)("task", None, tokenizer, **common, **more) for api in (ours, pyreft))
        same_rows([one[i] for i in range(3)], [two[i] for i in range(3)])
    from pyreft.dataset import ReftClassificationDataset, ReftGenerationDataset

    more = {"prompt_field": "instruction", "completion_field": "output"}
    one, two = (
        of("t", None, tokenizer, **common, **more) for of in (ours.ReftGenerationDataset, ReftGenerationDataset)
    )
    same_rows([one[i] for i in range(3)], [two[i] for i in range(3)])
    more = {"input_field": "output", "label_field": "output"}
    mine = ours.ReftClassificationDataset("t", None, tokenizer, **common, **more)
    same_rows([mine[i] for i in range(3)], list(ReftClassificationDataset("t", None, tokenizer, **common, **more)))


@pytest.mark.parametrize("component", ["block_output", "mlp_output", "attention_input"])
@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_pyreft_loads_what_we_save(kind, component, tmp_path):
    torch.manual_seed(2)
    made = [INTERVENTIONS[kind](embed_dim=WIDTH, low_rank_dimension=4, add_bias=True) for _ in range(LAYERS)]
    source = ours.get_reft_model(
        make("llama"),
        ours.ReftConfig([{"layer": layer, "component": component, "intervention": m} for layer, m in enumerate(made)]),
    )
    inputs = batch("left")
    with torch.no_grad():
        exact = source(inputs, unit_locations=WHERE)[1].logits
        ours.save(source, tmp_path / "first")
        for file in (tmp_path / "first").glob("*.bin"):  # numbers that bfloat16 holds, as pyreft's load makes W that
            state = torch.load(file)
            for name in set(state) - {"rotate_layer"}:
                if not name.startswith("rotate_layer.") and state[name].is_floating_point():
                    state[name] = state[name].bfloat16().float()
            torch.save(state, file)
        mine = ours.ReftModel.load(tmp_path / "first", make("llama"))
        ours.save(mine, tmp_path / "saved")
        reloaded = pyreft.ReftModel.load(str(tmp_path / "saved"), make("llama"))
        for intervention in reloaded.interventions.values():
            intervention.float()
        wanted = reloaded(inputs, unit_locations=WHERE)[1].logits
        torch.testing.assert_close(mine(inputs, unit_locations=WHERE)[1].logits, wanted, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(wanted, exact, rtol=0.1, atol=0.1)  # but for the rounding of W
        if component.endswith("output"):
            adapter = ours.load(tmp_path / "saved", make("llama"))
            columns = torch.tensor(WHERE["sources->base"][1][0])
            torch.testing.assert_close(adapter(**inputs, reft_positions=columns).logits, wanted, rtol=1e-4, atol=2e-5)
            ours.save(adapter, tmp_path / "adapter")
            again = pyreft.ReftModel.load(str(tmp_path / "adapter"), make("llama"))
            for intervention in again.interventions.values():
                intervention.float()
            assert torch.equal(again(inputs, unit_locations=WHERE)[1].logits, wanted)


@pytest.mark.parametrize("kind", ["noreft", "nodireft"])
def test_pyreft_cannot_build_these_two_from_a_file_of_its_own_either(kind, tmp_path):
    """Its constructor wants add_bias, and no field of config.json can give it: hence the twins that our save writes."""
    own = getattr(pyreft, f"{kind.title()}Intervention")(embed_dim=WIDTH, low_rank_dimension=4, add_bias=False)
    config = pyreft.ReftConfig(representations={"layer": 1, "component": "block_output", "intervention": own})
    pyreft.get_reft_model(make("llama"), config).save(str(tmp_path / "theirs"))
    ours.save(ours.ReftModel.load(tmp_path / "theirs", make("llama")), tmp_path / "ours", keep_type=True)
    for folder in ("theirs", "ours"):
        with pytest.raises(KeyError, match="add_bias"):
            pyreft.ReftModel.load(str(tmp_path / folder), make("llama"))


def test_the_words_for_places_are_those_of_pyvenes_tables():
    """For each class that is written with words, the words mean the same modules there; all others get paths."""
    from pyvene.models.intervenable_modelcard import type_to_module_mapping

    from fastreft.pyreft.components import _KNOWN

    known = {of.__name__: words for of, words in type_to_module_mapping.items() if _KNOWN.fullmatch(of.__name__)}
    assert len(known) == 22
    attention = {"GPT2": "attn.resid_dropout", "GPTNeo": "attn", "GPTNeoX": "attention"}  # else self_attn
    for name, words in known.items():
        block = words["block_output"][0]
        family = max((key for key in attention if name.startswith(key)), key=len, default="")
        assert words["mlp_output"][0] == words["mlp_input"][0] == f"{block}.mlp"
        assert words["attention_output"][0] == f"{block}.{attention.get(family, 'self_attn')}"
        assert words["attention_input"][0] == words["attention_output"][0].removesuffix(".resid_dropout")


@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_pyrefts_classes_take_every_file_of_ours(kind, tmp_path):
    made = INTERVENTIONS[kind](embed_dim=WIDTH, low_rank_dimension=4, add_bias=True)
    checkpoint.write(tmp_path, [Entry(0, "block_output", made)])
    (file,) = tmp_path.glob("*.bin")
    own = getattr(pyreft, f"{kind.title()}Intervention")(
        embed_dim=WIDTH, low_rank_dimension=4, add_bias=True, dtype=torch.float32
    )
    own.load_state_dict(torch.load(file))
    h = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(own(h), made(h), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_we_load_what_pyreft_saves(kind, tmp_path):
    config = pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "low_rank_dimension": 4,
                "intervention": getattr(pyreft, f"{kind.title()}Intervention")(
                    embed_dim=WIDTH, low_rank_dimension=4, dtype=torch.float32, add_bias=True
                ),
            }
            for layer in range(LAYERS)
        ]
    )
    model, inputs = pyreft.get_reft_model(make("llama"), config), batch("left")
    model.save(str(tmp_path / "saved"))
    model.save_intervention(str(tmp_path / "checkpoint-1" / "intervenable_model"))
    with torch.no_grad():
        wanted = model(inputs, unit_locations=WHERE)[1].logits
        for folder in ("saved", "checkpoint-1"):
            mine = ours.ReftModel.load(tmp_path / folder, make("llama"), intervention_type=kind)
            torch.testing.assert_close(mine(inputs, unit_locations=WHERE)[1].logits, wanted, rtol=1e-4, atol=2e-5)


def test_pyreft_loads_the_oracles_files_from_our_hands(tmp_path):
    """Load and save again, and pyreft makes of it what it made of its own."""
    data = oracles.io("llama")
    where = {"sources->base": (None, data["split_float32"]["unit_locations"])}
    ours.ReftModel.load(oracles.folder("llama", "split"), oracles.base_model("llama")).save(tmp_path)
    found = []
    for folder in (oracles.folder("llama", "split"), tmp_path):
        model = pyreft.ReftModel.load(str(folder), oracles.base_model("llama"))
        for intervention in model.interventions.values():
            intervention.float()
        with torch.no_grad():
            found.append(model(oracles.inputs(data), unit_locations=where)[1].logits)
    assert torch.equal(*found)


def test_the_first_steps_of_training_follow_pyrefts():
    """At step 0 the same loss; then two ways along one manifold, close while the steps are few."""
    torch.manual_seed(4)
    build = lambda api: api.get_reft_model(  # noqa: E731
        make("llama"),
        api.ReftConfig(
            representations=[
                {
                    "layer": layer,
                    "component": "block_output",
                    "low_rank_dimension": 4,
                    "intervention": api.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=4, dtype=torch.float32),
                }
                for layer in range(LAYERS)
            ]
        ),
    )
    other, mine = build(pyreft), build(ours)
    with torch.no_grad():
        for held, given in zip(mine.interventions.values(), other.interventions.values(), strict=True):
            held.load_state_dict(format.to_intervention(dict(given.state_dict()), "it", "loreft").state_dict())
    curves = []
    inputs = batch("left")
    for model in (mine, other):
        optimizer = torch.optim.AdamW(model.get_trainable_parameters(), lr=2e-3, weight_decay=0.0)
        losses = []
        for _ in range(30):
            loss = model(inputs, unit_locations=WHERE, labels=inputs["input_ids"])[1].loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0][0] == pytest.approx(curves[1][0], abs=1e-5)
    drop = curves[1][0] - curves[1][-1]
    assert drop > 0
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 0.2 * drop


class ByRows(pyreft.LoreftIntervention):
    """pyreft's LoReFT by some of its rows, as its users write it: pyreft 0.1.0's own takes ``subspaces`` and ignores them."""

    def forward(self, base, source=None, subspaces=None):
        Q = self.rotate_layer.weight
        diff = self.learned_source(base) - self.rotate_layer(base)
        edits = [diff[i][:, rows] @ Q[:, rows].T for i, rows in enumerate(subspaces)]
        return base + torch.stack(edits)


def test_subspaces():
    """The logits, the loss, the gradients of W and b, and the text; and ours within pyreft's model."""
    torch.manual_seed(0)
    settings = {"embed_dim": WIDTH, "low_rank_dimension": 8, "dtype": torch.float32}
    made = [ByRows(**settings) for _ in range(LAYERS)]
    mine = [ours.LoreftIntervention(**settings) for _ in range(LAYERS)]
    with torch.no_grad():
        for a, b in zip(mine, made, strict=True):
            a.R.copy_(b.rotate_layer.weight.T)
            a.W.copy_(b.learned_source.weight)
            a.b.copy_(b.learned_source.bias)

    def model_of(api, interventions):
        at = [
            {"layer": i, "component": "block_output", "low_rank_dimension": 8, "intervention": m}
            for i, m in enumerate(interventions)
        ]
        return api.get_reft_model(make("llama"), api.ReftConfig(representations=at))

    inputs = batch("right", (9, 9, 9))
    labels = torch.where(torch.arange(9) < 6, -100, inputs["input_ids"])
    rows = [[[0, 1, 2, 3], [4, 5, 6, 7], [0, 3, 5, 6]]] * LAYERS
    models = [model_of(pyreft, made), model_of(ours, mine)]
    found = [model(inputs, unit_locations=WHERE, subspaces=rows, labels=labels)[1] for model in models]
    for output in found:
        output.loss.backward()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found[1].logits, found[0].logits, **close)
    torch.testing.assert_close(found[1].loss, found[0].loss, **close)
    for a, b in zip(mine, made, strict=True):
        torch.testing.assert_close(a.W.grad, b.learned_source.weight.grad, **close)
        torch.testing.assert_close(a.b.grad, b.learned_source.bias.grad, **close)
    options = {"unit_locations": WHERE, "subspaces": rows, "intervene_on_prompt": True, "max_new_tokens": 6}
    one, two = (model.generate(inputs, **options)[1] for model in models)
    assert torch.equal(one, two)
    guests = model_of(pyreft, copy.deepcopy(mine))
    with torch.no_grad():
        within = guests(inputs, unit_locations=WHERE, subspaces=rows)[1].logits
    torch.testing.assert_close(within, found[1].logits, **close)
