"""An encoder-decoder's decoder edited: its prompt is what it is given to start with, not what drafts make of that."""

from functools import lru_cache

import pytest
import torch
from recomputed import DECODERS, GREEDY, SHOWN, Case, check, plain_of, prompts
from torch.nn import functional as F

LENGTHS = {"none": [9, 9, 9], "left": [9, 6, 7], "start": [1, 1, 1]}
POSITIONS = ["f2+l3", "l1", "prompt", "decode", "d2", "1:4"]


@lru_cache
def greedy(family, positions, side):
    """The case, its inputs, and the tokens and logits of recomputing everything, edited at the decoder's prompt."""
    made = Case(family, positions)
    inputs, _ = prompts("left")
    lengths, width = LENGTHS[side], LENGTHS[side][0]
    if side != "start":  # the first token of all is the decoder's start, 0
        torch.manual_seed(3)
        ids = F.pad(torch.randint(2, 20, (3, width - 1)), (1, 0))
        inputs["decoder_input_ids"] = ids
    if side == "left":
        inputs["decoder_attention_mask"] = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    written = width if positions == "decode" else None
    chosen = [[]] * 3 if written else made.chosen(lengths, "left", width)
    wanted = made.greedy(inputs, chosen, written)
    unedited = made.greedy(inputs, [[]] * 3)
    assert not torch.allclose(unedited[1], wanted[1], rtol=1e-3)
    return made, inputs, wanted


def last(inputs, wanted):
    """The last sample alone: drafts are for one at a time."""
    return {name: value[2:] for name, value in inputs.items()}, (wanted[0][2:], wanted[1][:, 2:])


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", list(LENGTHS))
def test_greedy(family, positions, side):
    made, inputs, wanted = greedy(family, positions, side)
    check(made.model.generate(**inputs, **SHOWN), wanted)
    check(made.model.generate(**inputs, **SHOWN, use_cache=False), wanted)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", ["none", "start"])
def test_drafts(family, positions, side):
    made, inputs, wanted = greedy(family, positions, side)
    one, wanted = last(inputs, wanted)
    for assistant in (plain_of(family), made.model.get_base_model()):
        check(made.model.generate(**one, **SHOWN, assistant_model=assistant), wanted)
    check(made.model.generate(**one, **SHOWN, prompt_lookup_num_tokens=3), wanted)


@pytest.mark.parametrize("family", DECODERS)
def test_the_start_that_is_put_before_a_prompt_counts(family):
    made, inputs, wanted = greedy(family, "f2+l3", "none")
    without = inputs | {"decoder_input_ids": inputs["decoder_input_ids"][:, 1:]}
    check(made.model.generate(**without, **SHOWN), wanted)
    one, wanted = last(without, wanted)
    check(made.model.generate(**one, **SHOWN, prompt_lookup_num_tokens=3), wanted)


@pytest.mark.parametrize("family", DECODERS)
def test_the_model_gets_its_own_method_back(family):
    made = Case(family, "l1")
    base = made.model.unload()
    assert "_prepare_decoder_input_ids_for_generation" not in vars(base) and "generate" not in vars(base)
    inputs, _ = prompts("left")
    assert torch.equal(base.generate(**inputs, **GREEDY), made.plain.generate(**inputs, **GREEDY))
