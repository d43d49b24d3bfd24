"""What cannot be edited is refused in one sentence, before any block has run."""

import pytest
import torch
import transformers
from tiny import batch, blocks, make
from torch import nn

from fastreft import ReftConfig, get_reft_model

on_a_cpu = pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="a GPU is not asked what its masks hold")


class Ran(AssertionError):
    """A block has run."""


def refusing(**config):
    """An edited model whose blocks must not run."""
    model = get_reft_model(make("llama"), ReftConfig(**config))

    def ran(*_):
        raise Ran

    for block in blocks(model.get_base_model()):
        block.register_forward_pre_hook(ran)
    return model


def test_a_model_without_blocks():
    plain = nn.Sequential(nn.Linear(4, 4))
    plain.config = make("llama").config
    with pytest.raises(ValueError, match=r"^\S.*target_modules") as caught:
        get_reft_model(plain, ReftConfig())
    assert "\n" not in str(caught.value)


def test_a_layer_that_the_model_lacks():
    with pytest.raises(
        ValueError, match=r"^layers_to_transform is \[0, 99\]; the model's layers to choose from are 0 to"
    ):
        get_reft_model(make("llama"), ReftConfig(layers_to_transform=[0, 99]))


@pytest.mark.parametrize("text", ["f5 + l5", "first", "f0", "l-1", "f2+f3", ""])
def test_positions_that_are_none(text):
    with pytest.raises(ValueError, match=f"^positions is '{text}'; it must be".replace("+", r"\+")):
        ReftConfig(positions=text)


@on_a_cpu
def test_rows_out_of_range():
    inputs = batch("left")
    model = refusing()
    with pytest.raises(IndexError, match=r"^reft_positions holds 9, past the last of 9 tokens$"):
        model(**inputs, reft_positions=torch.tensor([[9]]))
    with pytest.raises(IndexError, match=r"^reft_positions holds 9, past the last of 9 tokens$"):
        model.generate(**inputs, reft_positions=torch.tensor([[9]]), max_new_tokens=1)


def test_rows_of_another_kind_or_shape():
    inputs = batch("left")
    model = refusing()
    for index in (torch.tensor([[0.5]]), torch.tensor([[True]]), torch.zeros(2, 1, dtype=torch.long), torch.tensor(1)):
        with pytest.raises(
            ValueError, match=r"^reft_positions has shape .*; it must be integers of shape \(batch, n\)"
        ):
            model(**inputs, reft_positions=index)


@on_a_cpu
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_a_mask_that_hides_a_whole_sample(how):
    inputs = batch("left")
    inputs["attention_mask"][1] = 0
    model = refusing()
    call = model if how == "forward" else lambda **given: model.generate(**given, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"^attention_mask hides every token of sample 1; each sample must show one"):
        call(**inputs)
    with model.disable_adapter(), pytest.raises(Ran):  # the base takes it as ever
        call(**inputs)


def test_a_container_as_a_target():
    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = transformers.PretrainedConfig(hidden_size=8)
            self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2))

    with pytest.raises(ValueError, match=r"target_modules means blocks\.0, a Sequential, which runs whatever is in it"):
        get_reft_model(Stack(), ReftConfig(r=2, target_modules=r"blocks\.\d+"))
