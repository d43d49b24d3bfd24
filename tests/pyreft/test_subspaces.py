"""pyvene's ``subspaces`` in the drop-in: rows of R, or groups of a ``subspace_partition``, of each sample."""

import datasets
import pytest
import torch
from drop_in import at
from tiny import LAYERS, WIDTH, batch, logits, make
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import fastreft.pyreft as pyreft
from fastreft.pyreft import checkpoint
from fastreft.tasks.models import load_base, load_tokenizer

R, COLUMNS = 6, [1, 4]
ROWS = [[0, 1, 2], [3, 4, 5], [0, 5]]


def model_of(partition=None, base=None):
    base = base or make("llama")
    torch.manual_seed(5)
    places = [
        {"layer": i, "component": "block_output", "low_rank_dimension": R, "subspace_partition": partition,
         "intervention": pyreft.LoreftIntervention(embed_dim=base.config.hidden_size, low_rank_dimension=R)}
        for i in range(LAYERS)
    ]  # fmt: skip
    return pyreft.get_reft_model(base, pyreft.ReftConfig(representations=places))


def by_hand(model, rows):
    """The plain model with the formula in hooks: each sample's rows of R at the columns."""
    base = make("llama")
    mask = torch.zeros(len(rows), 1, R)
    for i, own in enumerate(rows):
        mask[i, 0, own] = 1
    for block, m in zip(base.model.layers, model.interventions.values(), strict=True):

        def hook(_block, _args, out, m=m):
            h = (out if isinstance(out, torch.Tensor) else out[0]).clone()
            at = h[:, COLUMNS]
            h[:, COLUMNS] = at + ((at @ m.W.T + m.b - at @ m.R.T) * mask) @ m.R
            return h if isinstance(out, torch.Tensor) else (h, *out[1:])

        block.register_forward_hook(hook)
    return base


def test_rows_of_each_sample():
    model, inputs, where = model_of(), batch("right", (9, 9, 9)), at(COLUMNS)
    wanted = logits(by_hand(model, ROWS), inputs)
    with torch.no_grad():
        for given in ([ROWS] * LAYERS, torch.tensor([[[0, 1, 2], [3, 4, 5], [0, 5, -1]]] * LAYERS)):
            found = model(inputs, unit_locations=where, subspaces=given)[1].logits
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        whole = model(inputs, unit_locations=where)[1].logits
        for given in (list(range(R)), [[[*range(R)]] * 3] * LAYERS):
            assert torch.equal(model(inputs, unit_locations=where, subspaces=given)[1].logits, whole)
        one = model(inputs, unit_locations=where, subspaces=2)[1].logits
        torch.testing.assert_close(one, logits(by_hand(model, [[2]] * 3), inputs), rtol=1e-4, atol=1e-5)


def test_groups_of_a_partition_and_their_files(tmp_path):
    """Two numbers are a range, as in pyvene; the partition is saved, loaded, converted and written back."""
    model, inputs, where = model_of([[0, 3], [3, 4, 5]]), batch("right", (9, 9, 9)), at(COLUMNS)
    with torch.no_grad():
        found = model(inputs, unit_locations=where, subspaces=[[[0], [1], [1, 0]]] * LAYERS)[1].logits
        rows = [[[0, 1, 2], [3, 4, 5], [*range(6)]]] * LAYERS
        assert torch.equal(found, model_of()(inputs, unit_locations=where, subspaces=rows)[1].logits)
        model.save(tmp_path / "theirs")
        again = pyreft.ReftModel.load(tmp_path / "theirs", make("llama"))
        assert torch.equal(
            again(inputs, unit_locations=where, subspaces=[[[0], [1], [1, 0]]] * LAYERS)[1].logits, found
        )
    adapter = pyreft.load(tmp_path / "theirs", make("llama"))
    assert adapter.peft_config["default"].subspaces == [[0, 1, 2], [3, 4, 5]]
    mine = logits(adapter, {**inputs, "reft_positions": torch.tensor([COLUMNS] * 3), "subspaces": [[0], [1], [1, 0]]})
    assert torch.equal(mine, found)
    pyreft.save(adapter, tmp_path / "back")
    partitions = [entry.intervention.partition for entry in checkpoint.read(tmp_path / "back")]
    assert partitions == [(("0", (0, 1, 2)), ("1", (3, 4, 5)))] * LAYERS


def test_generation_and_beams():
    model, inputs, where = model_of(), batch("left"), at([4, 8])
    options = {"intervene_on_prompt": True, "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    mixed = model.generate(inputs, unit_locations=where, subspaces=[ROWS] * LAYERS, **options)[1]
    for i, rows in enumerate(ROWS):
        alone = model.generate(inputs, unit_locations=where, subspaces=[[rows] * 3] * LAYERS, **options)[1]
        assert torch.equal(mixed[i], alone[i])
    steps = {"max_new_tokens": 4, "min_new_tokens": 4}  # the steps are edited, and the prompt is not
    written = [model.generate(inputs, subspaces=rows, **steps)[1] for rows in ([0, 1], [2, 3])]
    assert not torch.equal(*written)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[[0]] * 3], "subspaces is .*; it must be rows, nested .* for 3 interventions"),
        ([[[0]] * 2] * LAYERS, "subspaces has rows for 2 samples; the batch has 3"),
        ([[[R]] * 3] * LAYERS, "subspaces names 6; this LoreftIntervention has no named subspaces, and rows 0 to 5"),
        ("a", "subspaces is 'a'; it must be rows, nested"),
    ],
)
def test_wrong_ones(given, message):
    with pytest.raises(ValueError, match=message):
        model_of()(batch("left"), unit_locations=at(COLUMNS), subspaces=given)


def test_a_data_set_with_subspaces_trains_them(tmp_path):
    """As in pyreft's composition example: the rows of a task are trained by its own records."""
    tokenizer = load_tokenizer("embedded")
    tokenizer.model_max_length = 64
    records = datasets.Dataset.from_list(
        [{"instruction": f"Say {i}", "output": f" {i}.", "subspaces": [2, 3, 4] if i % 2 else [2, 5]} for i in range(8)]
    )
    model = model_of(base=load_base("embedded"))
    data = pyreft.ReftRawDataset(
        "Subloreft", None, tokenizer, dataset=records, num_interventions=LAYERS, position="l1", share_weights=True
    )
    assert data[1]["subspaces"] == [[2, 3, 4]] * LAYERS
    pad = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100, padding="longest")
    collator = pyreft.ReftDataCollator(data_collator=pad)
    assert collator([data[0], data[1]])["subspaces"][:, 0].tolist() == [[2, 5, -1], [2, 3, 4]]
    before = {name: p.detach().clone() for name, p in model.interventions.named_parameters()}
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_steps=99,
    )
    pyreft.ReftTrainerForCausalLM(
        model=model, tokenizer=tokenizer, args=arguments, train_dataset=data, data_collator=collator
    ).train()
    for name, now in model.interventions.named_parameters():
        assert torch.equal(now[:2], before[name][:2]) and (now[2:] != before[name][2:]).reshape(4, -1).any(1).all(), (
            name
        )


def test_a_noreft_with_groups_is_written_as_it_is(tmp_path):
    torch.manual_seed(0)
    made = pyreft.NoreftIntervention(embed_dim=WIDTH, low_rank_dimension=4, subspace_partition=[[0, 2], [2, 4]])
    place = {"layer": 0, "component": "block_output", "low_rank_dimension": 4, "intervention": made}
    model = pyreft.get_reft_model(make("llama"), pyreft.ReftConfig(representations=place))
    with pytest.raises(ValueError, match="a noreft with subspaces has no equal with an orthonormal R"):
        pyreft.save(model, tmp_path / "twin")
    assert not (tmp_path / "twin").exists()
    pyreft.save(model, tmp_path / "own", keep_type=True)
    assert checkpoint.read(tmp_path / "own")[0].intervention.partition == made.partition
