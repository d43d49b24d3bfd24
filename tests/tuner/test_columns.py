"""Columns of a data set that are ours reach the model through Trainer, which drops what a forward does not name."""

import inspect

import pytest
import torch
from datasets import Dataset
from tiny import batch, make
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.utils.generic import find_labels

from fastreft import ReftConfig, get_reft_model
from fastreft.plan.asked import OURS

ROWS = 4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-cls"])
@pytest.mark.parametrize("column", OURS)
def test_a_column_arrives(kind, column, tmp_path):
    torch.manual_seed(0)
    model = get_reft_model(make(kind), ReftConfig(r=2, positions="f2+l3"))
    ids = torch.randint(1, 61, (ROWS, 9))
    labels = torch.tensor([0, 1, 0, 1]) if kind == "bert-cls" else ids
    values = {
        "reft_positions": torch.tensor([[1, 4]] * ROWS),
        "reft_labels": torch.where(torch.arange(9) < 5, -100, ids),
        "reft_prompt_lengths": torch.tensor([5, 6, 7, 8]),
    }[column]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist(), column: values.tolist()})
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=ROWS, max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator)
    trainer.train()
    found = sorted(map(tuple, model.reft_report().edits[0].columns))
    model.train()
    model(input_ids=ids, labels=labels, **{column: values})
    assert found == sorted(map(tuple, model.reft_report().edits[0].columns))
    assert found[0] != tuple(range(9)) and len(found) == ROWS


def test_they_are_no_labels_to_trainer():
    model = get_reft_model(make("llama"), ReftConfig(r=2))
    assert find_labels(type(model.get_base_model())) == ["labels"]


def test_the_signature_names_them_once_and_generate_is_unharmed():
    first, second = (get_reft_model(make("llama"), ReftConfig(r=2)) for _ in range(2))
    names = list(inspect.signature(second.get_base_model().forward).parameters)
    assert [names.count(name) for name in OURS] == [1, 1, 1]
    first.generate(**batch(), max_new_tokens=1)
    with pytest.raises(ValueError, match="not_an_argument"):
        first.generate(**batch(), max_new_tokens=1, not_an_argument=1)
