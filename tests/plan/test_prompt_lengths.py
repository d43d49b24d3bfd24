"""``reft_prompt_lengths``, ``reft_positions`` and ``reft_labels`` are used, by a forward and by ``generate``, or refused."""

import pytest
import torch
from recomputed import Case, prompts
from tiny import batch, columns, make
from torch import nn
from transformers import DynamicCache

from fastreft import ReftConfig, get_reft_model

LENGTHS = torch.tensor([3, 2, 4])


def made(positions="f2+l3", kind="llama", **settings):
    torch.manual_seed(2)
    return get_reft_model(make(kind), ReftConfig(positions=positions, r=3, **settings))


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"num_beams": 2}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_takes_the_lengths_of_prompts(side, settings):
    case = Case("llama")
    inputs, _ = prompts(side)
    labels = torch.where(inputs["attention_mask"].cumsum(1) > LENGTHS[:, None], 0, -100)
    chosen = columns(inputs["attention_mask"], 2, 3, labels.tolist())
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | settings
    plainly = {name: value for name, value in settings.items() if name not in ("use_cache", "prefill_chunk_size")}
    wanted = case.generated(chosen, **inputs, **plainly)
    assert torch.equal(case.model.generate(**inputs, **settings, reft_prompt_lengths=LENGTHS), wanted)
    assert not torch.equal(case.model.generate(**inputs, **settings), wanted)


def test_what_generate_does_not_take():
    inputs = batch("left")
    with pytest.raises(ValueError, match="reft_labels is given to generate"):
        made().generate(**inputs, reft_labels=inputs["input_ids"])
    with pytest.raises(ValueError, match=r"reft_prompt_lengths has shape \(2,\)"):
        made().generate(**inputs, reft_prompt_lengths=LENGTHS[:2])
    with pytest.raises(ValueError, match="reft_prompt_lengths is given to an encoder-decoder"):
        Case("t5").model.generate(**inputs, reft_prompt_lengths=LENGTHS)


@pytest.mark.parametrize("name", ["reft_positions", "reft_labels"])
def test_a_list_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is a list; it must be a tensor"):
        made()(**batch("left"), **{name: [[1], [2], [3]]})


def test_labels_of_another_shape_are_named():
    inputs = batch("left")
    with pytest.raises(
        ValueError, match=r"reft_labels has shape \(3, 8\); it must have one entry a token, here \(3, 9\)"
    ):
        made()(**inputs, reft_labels=inputs["input_ids"][:, 1:])


@pytest.mark.parametrize("odd", [-1, 99])
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_lengths_that_no_prompt_has(odd, how):
    model = made()
    call = model if how == "forward" else model.generate
    with pytest.raises(ValueError, match=f"reft_prompt_lengths holds {odd}; it must be from 0 to .* here [0-9]"):
        call(**batch("left"), reft_prompt_lengths=torch.tensor([2, odd, 3]))


def test_generate_refuses_a_prompt_longer_than_its_sample():
    """It would end among what is written, a token later each step without a cache."""
    inputs = batch("left")
    tokens = inputs["attention_mask"].sum(1)
    i = int(tokens.argmin())
    assert tokens[i] < inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"holds {tokens[i] + 1}; it must be from 0 to .* here {tokens[i]}$"):
        made().generate(**inputs, reft_prompt_lengths=torch.where(torch.arange(3) == i, tokens + 1, tokens))


def test_prompts_without_a_token_are_said():
    with torch.no_grad(), pytest.warns(UserWarning, match="no sample of this batch has a prompt"):
        made()(**batch("left"), reft_prompt_lengths=torch.tensor([0, 0, 0]))


def test_packed_samples_have_no_single_length():
    ids, places = torch.randint(1, 61, (1, 12)), torch.tensor([[*range(7), *range(5)]])
    model = made()
    with pytest.raises(ValueError, match=r"position_ids .* say that several sequences are packed into a sample"):
        model(input_ids=ids, position_ids=places, reft_prompt_lengths=torch.tensor([5]))
    model(input_ids=ids, position_ids=torch.arange(12)[None], reft_prompt_lengths=torch.tensor([5]))
    assert model.reft_report().prompt_lengths == [5]


class Soft(nn.Module):
    """Puts a prompt of its own before the text."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.prompt = lm, nn.Parameter(torch.randn(3, 32))

    def forward(self, input_ids, attention_mask):
        embeds = self.lm.get_input_embeddings()(input_ids)
        prompt = self.prompt.expand(len(embeds), -1, -1)
        mask = nn.functional.pad(attention_mask, (3, 0), value=1)
        return self.lm(inputs_embeds=torch.cat([prompt, embeds], 1), attention_mask=mask).logits


@pytest.mark.parametrize("given", [{"reft_positions": torch.tensor([[0]] * 3)}, {"reft_prompt_lengths": LENGTHS}])
def test_columns_of_a_module_that_puts_tokens_of_its_own_before(given):
    model = get_reft_model(Soft(make("llama")), ReftConfig(positions="f2+l3"))
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"{name} counts the 9 tokens a sample that the Soft is given, .* with 12"):
        model(**batch("right"), **given)
    model(**batch("right"))


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
def test_a_prompt_in_parts_by_hand(positions, recwarn):
    ids, model = batch("right", (9, 9, 9))["input_ids"], made(positions)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :4], past_key_values=cache)
        recwarn.clear()
        model(input_ids=ids[:, 4:5], past_key_values=cache)
        assert not recwarn.list
        model(input_ids=ids[:, 5:7], past_key_values=cache)
        assert [str(w.message).startswith("this forward has several tokens") for w in recwarn] == [True] * (
            positions != "all"
        )
        with pytest.raises(ValueError, match="reft_prompt_lengths is given with past_key_values that hold tokens"):
            model(input_ids=ids[:, 7:], past_key_values=cache, reft_prompt_lengths=LENGTHS)


def test_the_report_of_explicit_positions_has_the_prompts():
    inputs, model = batch("left"), made()
    with torch.no_grad():
        model(**inputs, reft_positions=torch.tensor([[8], [8], [8]]))
    assert model.reft_report().prompt_lengths == [7, 4, 9]
    assert model.reft_report().edits[0].columns == [[8], [8], [8]]
