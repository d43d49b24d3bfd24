"""An edit that edits nothing is an error, and what may not be meant is said once."""

import warnings

import pytest
import torch
from recomputed import plain_of
from tiny import adapter_weights, batch, columns, hooked, make
from torch import nn

from fastreft import ReftConfig, get_reft_model


def labelled(inputs, start):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :start] = -100
    return labels


def made(positions="f2+l3", kind="llama", **settings):
    torch.manual_seed(2)
    return get_reft_model(make(kind), ReftConfig(positions=positions, r=3, **settings))


@pytest.mark.parametrize("positions", ["f2+l3", "l1", "prompt"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_without_a_prompt_is_refused(positions, kind):
    inputs, model = batch("right"), made(positions, kind).train()
    with pytest.raises(ValueError, match="no sample of this batch has a prompt"):
        model(**inputs, labels=labelled(inputs, 0))
    assert torch.isfinite(model(**inputs, labels=labelled(inputs, 2)).loss)


def test_one_sample_with_a_prompt_is_enough():
    inputs, model = batch("right"), made().train()
    labels = labelled(inputs, 0)
    labels[1, :2] = -100
    assert torch.isfinite(model(**inputs, labels=labels).loss)
    assert model.reft_report().prompt_lengths == [0, 2, 0]


@pytest.mark.parametrize(
    "given",
    [
        {"labels": torch.full((3, 9), -100)},
        {"reft_positions": torch.full((3, 2), -1)},
    ],
)
def test_training_that_edits_nothing_is_refused(given):
    inputs = batch("right", (9, 9, 9))
    positions = "decode" if "labels" in given else "f2+l3"
    with pytest.raises(ValueError, match="this forward in training edits nothing"):
        made(positions).train()(**inputs, **given)


def test_training_of_padding_alone_is_refused():
    inputs, model = batch("left"), made().train()
    labels = labelled(inputs, 8)
    with pytest.raises(ValueError, match="this forward in training edits nothing"):
        model(**inputs, labels=labels, reft_positions=torch.tensor([[0, 1], [0, 1], [-1, -1]]))
    assert torch.isfinite(model(**inputs, labels=labels, reft_positions=torch.tensor([[0, 1], [0, 1], [0, -1]])).loss)


@pytest.mark.parametrize("how", ["fewer layers", "of an encoder whose outputs are given"])
def test_training_that_runs_no_edited_layer_is_refused(how):
    inputs = batch("right")
    if how == "fewer layers":
        model = made(layers_to_transform=[2], modules_to_save=["lm_head"]).train()
        model.get_base_model().config.num_hidden_layers = 2
        given = inputs | {"labels": labelled(inputs, 3)}
    else:
        model = get_reft_model(
            plain_of("t5").float(), ReftConfig(positions="f2+l3", modules_to_save=["lm_head"])
        ).train()
        states = torch.randn(3, 9, model.config.d_model)
        given = {
            "encoder_outputs": (states,),
            "attention_mask": inputs["attention_mask"],
            "labels": inputs["input_ids"],
        }
    with pytest.raises(ValueError, match="no module that an adapter edits was run"):
        model(**given)
    with model.disable_adapter():
        model(**given)
    model.eval()
    model(**given)


def test_positions_that_mean_no_token_in_evaluation_with_gradients():
    inputs, none = batch("right"), torch.full((3, 2), -1)
    with pytest.warns(UserWarning, match="reft_positions means no token of any sample"):
        made()(**inputs, reft_positions=none)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made()(**inputs, reft_positions=none)


def test_training_after_a_cache_is_refused():
    inputs, model = batch("right", (9, 9, 9)), made().train()
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.ones(3, 18)
    with pytest.raises(ValueError, match="its past_key_values hold tokens"):
        model(input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache, labels=inputs["input_ids"])


@pytest.mark.parametrize("positions", ["f2+l3", "decode", "d2"])
def test_disabled_adapters_train_nothing_and_need_nothing(positions):
    inputs, model = batch("right"), made(positions).train()
    with model.disable_adapter():
        assert torch.isfinite(model(**inputs, labels=labelled(inputs, 0)).loss)


def test_a_classifier_has_no_answer():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "the head of this")
        made(kind="bert").train()(**batch("right"), labels=torch.zeros(3, 9, dtype=torch.long))


def test_evaluation_without_labels_says_once_what_it_took_for_the_prompt():
    inputs, model = batch("left"), made()
    with torch.no_grad(), pytest.warns(UserWarning, match="in evaluation has no labels"):
        model(**inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**inputs)
        for quiet, more in ((made("f2"), {}), (made("all"), {}), (made(), {"labels": labelled(inputs, 7)})):
            quiet(**inputs, **more)
        made().generate(**inputs, max_new_tokens=1)


def test_several_answers_are_said_once():
    inputs = batch("right", (9, 9, 9))
    labels = labelled(inputs, 3)
    labels[1, 5] = -100
    model = made().train()
    with pytest.warns(UserWarning, match="a sample has several answers"):
        model(**inputs, labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**inputs, labels=labels)
        made("all").train()(**inputs, labels=labels)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_lengths_stand_for_labels(side):
    inputs, model = batch(side), made()
    lengths = torch.tensor([4, 2, 9])
    shown = inputs["attention_mask"]
    labels = torch.where(shown.cumsum(1) > lengths[:, None], inputs["input_ids"], -100)
    with torch.no_grad():
        wanted = model(**inputs, labels=labels).logits
        assert torch.equal(model(**inputs, reft_prompt_lengths=lengths).logits, wanted)
    report = model.reft_report()
    assert report.prompt_lengths == [4, 2, 9]
    assert report.edits[0].columns == columns(shown, 2, 3, labels.tolist())


@pytest.mark.parametrize("given", [torch.tensor([4, 2]), torch.tensor([[4], [2], [9]]), torch.ones(3), [4, 2, 9]])
def test_prompt_lengths_of_another_form_are_refused(given):
    with pytest.raises(ValueError, match=r"reft_prompt_lengths has .*; it must be integers, one a sample, here \(3,\)"):
        made()(**batch("left"), reft_prompt_lengths=given)


def test_the_report_is_of_the_last_prompt():
    inputs, model = batch("left"), made("f1+l2")
    assert str(model.reft_report()) == "the last forward edited nothing"
    model.generate(**inputs, max_new_tokens=3)
    report = model.reft_report()
    assert [(edit.layer, edit.adapter, edit.positions, edit.rows, edit.tokens) for edit in report.edits] == [
        (f"model.layers.{i}", "default", "f1+l2", 9, 27) for i in range(3)
    ]
    assert report.prompt_lengths == [7, 4, 9]
    assert "model.layers.1: default at f1+l2, 9 of 27 rows" in str(report)
    with model.disable_adapter(), torch.no_grad():
        model(**inputs)
    assert model.reft_report().edits == []


def test_many_places_cost_no_more_than_there_are_tokens():
    inputs = batch("left")
    plain = make("llama")
    model = made("f900000+l1000000")

    with torch.no_grad(), hooked(plain, adapter_weights(model), columns(inputs["attention_mask"], 900000, 1000000)):
        wanted = plain(**inputs).logits
    with torch.no_grad():
        found = model(**inputs).logits
    torch.testing.assert_close(found[inputs["attention_mask"].bool()], wanted[inputs["attention_mask"].bool()])
    plan = model.base_model._shared.local.here.latest[model.get_base_model().model]
    assert all(rows.numel() <= 2 * 27 for some in plan.asked().values() for rows in some)


@pytest.mark.parametrize("positions", ["f1000001", "f99999999999", "l" + "9" * 10000, "f\u0661", None, 3, ["f1"]])
def test_positions_without_bound_are_refused(positions):
    with pytest.raises(ValueError, match=r"positions is .*; it must be 'fN'") as said:
        ReftConfig(positions=positions)
    assert len(str(said.value)) < 250


def test_exported_for_any_batch():
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, inputs_embeds, attention_mask):
            return self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False).logits

    model = Logits(made())
    embeds, mask = torch.randn(3, 9, 32), batch("left")["attention_mask"]
    batches = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        model, (embeds, mask), dynamic_shapes=({0: batches}, {0: batches}), strict=False
    ).module()
    more, shown = torch.randn(5, 9, 32), batch("left", (7, 4, 9, 3, 8))["attention_mask"]
    with torch.no_grad():
        torch.testing.assert_close(exported(more, shown), model(more, shown))


def test_a_block_by_itself_is_said_once():
    inputs, model = batch("left"), made()
    inner = model.get_base_model().model
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"model\.layers\.0 is run outside its model's forward"):
            found = inner.forward(**inputs).last_hidden_state
        assert torch.equal(found, make("llama").model(**inputs).last_hidden_state)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            inner.forward(**inputs)
            with (other := made()).disable_adapter():
                other.get_base_model().model.forward(**inputs)


@pytest.mark.parametrize("edits", [True, False])
def test_what_a_gpu_says_a_step_later(edits):
    class Event:
        def query(self):
            return True

    inputs, model = batch("right"), made().train()
    model.base_model._shared.silence.waiting = torch.tensor(edits), Event(), "an earlier forward edited nothing"
    if not edits:
        with pytest.raises(ValueError, match="an earlier forward edited nothing"):
            model(**inputs, labels=labelled(inputs, 2))
    model(**inputs, labels=labelled(inputs, 2))
