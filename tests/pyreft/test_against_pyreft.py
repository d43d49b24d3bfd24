"""fastreft.pyreft beside the real pyreft: the same data, positions and results, and files that it loads."""

from __future__ import annotations

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


@pytest.mark.parametrize("kind", ["loreft", "consreft", "lobireft", "direft"])
def test_pyreft_loads_what_we_save(kind, tmp_path):
    """Noreft and Nodireft are no kinds that pyreft's load can make; see the next test."""
    torch.manual_seed(2)
    made = [INTERVENTIONS[kind](embed_dim=WIDTH, low_rank_dimension=4) for _ in range(LAYERS)]
    with torch.no_grad():
        for intervention in made:  # numbers that bfloat16 holds, as pyreft's load makes W that
            for name, parameter in intervention.named_parameters():
                if name != "R":
                    parameter.copy_(parameter.bfloat16())
    checkpoint.write(tmp_path, [Entry(layer, "block_output", m) for layer, m in enumerate(made)])
    reloaded = pyreft.ReftModel.load(str(tmp_path), make("llama"))
    for intervention in reloaded.interventions.values():
        intervention.float()
    mine = ours.ReftModel.load(tmp_path, make("llama"))
    adapter = ours.load(tmp_path, make("llama"))
    inputs = batch("left")
    columns = torch.tensor(WHERE["sources->base"][1][0])
    with torch.no_grad():
        wanted = reloaded(inputs, unit_locations=WHERE)[1].logits
        torch.testing.assert_close(mine(inputs, unit_locations=WHERE)[1].logits, wanted, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(adapter(**inputs, reft_positions=columns).logits, wanted, rtol=1e-4, atol=2e-5)


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
