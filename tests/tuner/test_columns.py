"""Columns of a data set that are ours reach the model through Trainer, which drops what a forward does not name."""

import inspect

import forked
import pytest
import torch
from datasets import Dataset
from tiny import batch, make
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments, default_data_collator
from transformers.utils.generic import find_labels

from fastreft import ReftConfig, get_reft_model
from fastreft.plan.said import OURS

ROWS = 4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-cls"])
@pytest.mark.parametrize("column", OURS)
def test_a_column_arrives(kind, column, tmp_path):
    torch.manual_seed(0)
    model = get_reft_model(make(kind), ReftConfig(r=2, positions="f2+l3"))
    ids = torch.randint(1, 61, (ROWS, 9))
    labels = torch.tensor([0, 1, 0, 1]) if kind == "bert-cls" else ids
    if column == "subspaces" and kind != "bert-cls":  # nothing else says where the prompt ends
        labels = torch.where(torch.arange(9) < 5, -100, ids)
    values = {
        "reft_positions": torch.tensor([[1, 4]] * ROWS),
        "reft_labels": torch.where(torch.arange(9) < 5, -100, ids),
        "reft_prompt_lengths": torch.tensor([5, 6, 7, 8]),
        "subspaces": torch.tensor([[0, -1], [0, 1], [1, -1], [0, -1]]),
    }[column]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist(), column: values.tolist()})
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=ROWS, max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=default_data_collator)
    trainer.train()
    report = model.reft_report()
    found, chosen = sorted(map(tuple, report.edits[0].columns)), sorted(report.subspaces or ())
    model.train()
    model(input_ids=ids, labels=labels, **{column: values})
    assert found == sorted(map(tuple, model.reft_report().edits[0].columns))
    assert chosen == sorted(model.reft_report().subspaces or ()) and bool(chosen) is (column == "subspaces")
    assert found[0] != tuple(range(9)) and len(found) == ROWS


def test_they_are_no_labels_to_trainer():
    model = get_reft_model(make("llama"), ReftConfig(r=2))
    assert find_labels(type(model.get_base_model())) == ["labels"]


def test_the_signature_names_them_once_and_generate_is_unharmed():
    first, second = (get_reft_model(make("llama"), ReftConfig(r=2)) for _ in range(2))
    names = list(inspect.signature(second.get_base_model().forward).parameters)
    assert [names.count(name) for name in OURS] == [1] * len(OURS)
    first.generate(**batch(), max_new_tokens=1)
    with pytest.raises(ValueError, match="not_an_argument"):
        first.generate(**batch(), max_new_tokens=1, not_an_argument=1)


class Around(nn.Module):
    """Somebody's module, which hands on what it is given."""

    def __init__(self, model):
        super().__init__()
        self.lm = model

    def forward(self, input_ids, labels=None, **others):
        return self.lm(input_ids=input_ids, labels=labels, **others)


class Deaf(Around):
    """One that knows nothing of others' arguments."""

    def forward(self, input_ids, labels=None):
        return self.lm(input_ids=input_ids, labels=labels)


def trainer_of(model, folder, collator=default_data_collator, table=True, **columns):
    torch.manual_seed(0)
    ids = torch.randint(1, 61, (ROWS, 9))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist(), **columns})
    data = data if table else [*data]
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=ROWS, max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collator)


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("run", ["train", "evaluate"])
def test_a_column_arrives_in_a_model_within_a_module(table, run, tmp_path):
    model = get_reft_model(make("llama"), ReftConfig(r=2, positions="f2+l3"))
    getattr(trainer_of(Around(model), tmp_path, table=table, reft_positions=[[1, 4]] * ROWS), run)()
    assert model.reft_report().edits[0].columns == [[1, 4]] * ROWS
    with pytest.raises(TypeError, match="reft_positions"):
        getattr(trainer_of(Deaf(model), tmp_path, table=table, reft_positions=[[1, 4]] * ROWS), run)()


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize(
    ("column", "value"), [("reft_positions", [1, 4]), ("reft_prompt_lengths", 3), ("reft_labels", [-100] * 5 + [7] * 4)]
)
def test_a_collator_that_leaves_a_column_out(column, value, table, tmp_path):
    model = get_reft_model(make("llama"), ReftConfig(r=2, positions="f2+l3"))
    given = {column: [value] * ROWS}
    trainer = trainer_of(model, tmp_path, DataCollatorWithFlattening(), table, **given)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(
            ValueError, match=f"{column} is a column of the data set, and DataCollatorWithFlattening leaves"
        ):
            run()
    trainer_of(make("llama"), tmp_path, DataCollatorWithFlattening(), table, **given).evaluate()  # not ours to say
    assert type(trainer.data_collator) is DataCollatorWithFlattening


@pytest.mark.parametrize(
    "first", ["from transformers import Trainer", "import fastreft, peft", "import fastreft.tuner.model"]
)
def test_whichever_is_imported_first(first):
    code = f"""
import sys, warnings
assert not {{"fastreft", "peft", "transformers.trainer"}} & set(sys.modules)
warnings.simplefilter("error", UserWarning)
{first}
from transformers import GPT2Config, GPT2LMHeadModel
from fastreft import ReftConfig, get_reft_model
get_reft_model(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_head=2, n_layer=1)), ReftConfig(r=1))
from transformers import Trainer
assert hasattr(Trainer._get_dataloader, "__wrapped__")
"""
    done = forked.run(code)
    assert done.returncode == 0, done.stderr
