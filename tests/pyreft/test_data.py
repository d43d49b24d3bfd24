"""pyreft's locations, data modules and data sets, as the functions of that name give them."""

from __future__ import annotations

import json

import datasets
import pytest
import torch

from fastreft import pyreft
from fastreft.pyreft import locations
from fastreft.tasks.models import load_tokenizer

PROMPTS, ANSWERS = ["The king said:", "Once upon a time there was an old fox.", "Why?"], [" no", " It slept.", " So."]


@pytest.fixture(scope="module")
def tokenizer():
    made = load_tokenizer("embedded")
    made.model_max_length = 64
    return made


def test_locations_are_those_that_pyreft_tabulates(shared):
    rows = json.loads((shared / "oracles" / "get_intervention_locations.json").read_text())
    assert len(rows) == 448
    for row in rows:
        assert pyreft.get_intervention_locations(**row["kwargs"]) == row["locations"], row["kwargs"]


def test_positions():
    assert pyreft.parse_positions("f3+l5") == (3, 5)
    assert pyreft.parse_positions("f3") == (3, 0)
    assert pyreft.parse_positions("l5") == (0, 5)
    for text in ("", "all", "f", "f3,l5", "d3", "1:"):
        with pytest.raises(ValueError, match="positions is "):
            pyreft.parse_positions(text)


def test_last_position(tokenizer):
    module = pyreft.make_last_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS, num_interventions=2)
    assert module["eval_dataset"] is None
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    for record, prompt, answer, length in zip(module["train_dataset"], PROMPTS, ANSWERS, lengths, strict=True):
        assert record["input_ids"] == tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
        assert record["labels"] == [-100] * length + record["input_ids"][length:]
        assert record["intervention_locations"] == [[length - 1]] * 2
    batch = module["data_collator"]([module["train_dataset"][i] for i in range(3)])
    assert batch["intervention_locations"].tolist() == [[[length - 1]] * 2 for length in lengths]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (batch["labels"] == -100).sum() == sum(lengths) + int((batch["attention_mask"] == 0).sum())


def test_multiple_positions(tokenizer):
    options = {"positions": "f2+l3", "num_interventions": 4, "nonstop": True}
    module = pyreft.make_multiple_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS, **options)
    for record, prompt, answer in zip(module["train_dataset"], PROMPTS, ANSWERS, strict=True):
        assert record["input_ids"] == tokenizer(prompt + answer)["input_ids"]
        assert record["intervention_locations"] == pyreft.get_intervention_locations(
            last_position=len(tokenizer(prompt)["input_ids"]), positions="f2+l3", pad_mode="last", num_interventions=4
        )
    with pytest.raises(ValueError, match="inputs has 3 texts and outputs 1"):
        pyreft.make_multiple_position_supervised_data_module(tokenizer, None, PROMPTS, ANSWERS[:1])


def test_data_sets_put_a_padding_token_first_and_count_from_one_before_the_end(tokenizer):
    records = datasets.Dataset.from_list([{"prompt": p, "answer": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    made = pyreft.ReftGenerationDataset(
        "task", None, tokenizer, dataset=records, position="f1+l1", num_interventions=2,
        prompt_field="prompt", completion_field="answer",
    )  # fmt: skip
    assert len(made) == 3
    for item, prompt, answer in zip((made[i] for i in range(3)), PROMPTS, ANSWERS, strict=True):
        ids = tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
        assert item["input_ids"].tolist() == [tokenizer.pad_token_id, *ids]
        assert item["attention_mask"].tolist() == [0] + [int(i != tokenizer.pad_token_id) for i in ids]
        length = len(tokenizer(prompt)["input_ids"])
        assert item["labels"].tolist() == [-100] * (length + 1) + ids[length:]
        # The second-last token of the prompt, one place on for the padding.
        assert item["intervention_locations"] == [[1], [length - 1]]


def test_alpacas_records_raw_ones_and_classification():
    tokenizer = load_tokenizer("embedded")
    records = [
        {"instruction": "Sing.", "input": "A song", "output": "La."},
        {"instruction": "Sing.", "input": "", "output": "Lo."},
    ]
    common = {"dataset": records, "position": "l1", "num_interventions": 1}
    made = pyreft.ReftSupervisedDataset(
        "alpaca", None, tokenizer, **common, no_stop=True,
        instruction_field="instruction", input_field="input", output_field="output",
    )  # fmt: skip
    texts = [tokenizer.decode(made[i]["input_ids"][1:]) for i in range(2)]
    assert "### Input:\nA song\n\n### Response:\nLa." in texts[0]
    assert "### Input:" not in texts[1]
    raw = pyreft.ReftRawDataset("raw", None, tokenizer, **common)
    assert raw[0]["intervention_locations"] == [[len(tokenizer("Sing.")["input_ids"])]]
    test = pyreft.ReftRawDataset("raw", None, tokenizer, data_split="test", **common)
    assert "labels" not in test[0]
    assert test.raw_dataset == records
    classes = pyreft.ReftClassificationDataset("c", None, tokenizer, **common, input_field="input", label_field=None)
    assert "labels" not in classes[0]


def test_a_data_set_of_ones_own(tokenizer, tmp_path):
    class Last(pyreft.ReftDataset):
        def preprocess(self, fields):
            self.pad_mode, self.fields_to_pad = "last", ["input_ids"]
            self.text = fields["text"]

        def tokenize(self, data_item):
            ids = self.tokenizer(data_item[self.text], return_tensors="pt")["input_ids"][0]
            return {"input_ids": ids, "labels": 1}, len(ids)

    path = tmp_path / "records.json"
    path.write_text("\n".join(json.dumps({"line": text}) for text in PROMPTS))
    made = Last("task", str(path), tokenizer, position="f1+l9", num_interventions=2, max_n_example=2, text="line")
    assert len(made) == 2
    ids = made[0]["input_ids"].tolist()
    assert ids[-1] == tokenizer.pad_token_id
    assert made[0]["labels"] == 1
    assert made[0]["intervention_locations"][0] == [0] + [len(ids) - 1] * 8
    with pytest.raises(NotImplementedError, match="ReftDataset must define tokenize"):
        pyreft.ReftDataset("task", str(path), tokenizer, position="l1", num_interventions=1)


# ---- unit_locations ------------------------------------------------------------------------------------------------


def test_every_form_of_unit_locations():
    nested = [[[0, 2], [1, 3]], [[4, 4], [5, -1]]]
    for given in (
        {"sources->base": (None, nested)},
        {"base": nested},
        {"sources->base": (None, torch.tensor(nested))},
        {"sources->base": (nested, nested)},
    ):
        assert locations.parse(given, 2, 2).index.tolist() == nested
    assert locations.parse({"base": 3}, 2, 2).index.tolist() == [[[3], [3]]] * 2
    assert locations.parse({"base": [3, 4]}, 1, 2).index.tolist() == [[[3, 4], [3, 4]]]
    assert locations.parse({"base": [[[1], [2, 3]]]}, 1, 2).index.tolist() == [[[1, -1], [2, 3]]]
    assert locations.parse(None, 2, 2).index is None


def test_rows_of_all_interventions_at_once():
    where = locations.parse({"base": [[[0, 2, 0], [1, -1, 3]], [[4], [4]]]}, 2, 2)
    rows = [where.rows(i, (2, 5), torch.device("cpu")) for i in range(2)]
    assert [sorted(r[r >= 0].tolist()) for r in rows] == [[0, 2, 6, 8], [4, 9]]
    beams = [where.rows(i, (4, 5), torch.device("cpu")) for i in range(2)]
    assert [sorted(r[r >= 0].tolist()) for r in beams] == [[0, 2, 5, 7, 11, 13, 16, 18], [4, 9, 14, 19]]
    with pytest.raises(IndexError, match="unit_locations holds column 4, past the last of 3 tokens"):
        where.rows(0, (2, 3), torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1]], r"unit_locations is \[\[1\]\]; it must be"),
        ({"sources->base": (1, 2, 3)}, r"must be \(None, locations\)"),
        ({"elsewhere": 1}, "unit_locations has the key 'elsewhere'"),
        ({"base": [[1]]}, "nested .intervention..sample..position., for 2 interventions"),
        ({"base": [[[1]]]}, "for 2 interventions"),
        ({"base": [[["a"]], [["b"]]]}, "it must be integers"),
        ({"base": torch.zeros(2, 2, 1)}, "a tensor of shape .* it must be integers"),
        ({"base": [[[1]] * 3] * 2}, "has locations for 3 samples; the batch has 2"),
    ],
)
def test_unit_locations_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        locations.parse(given, 2, 2)
