"""Generation with a cache edits the prompt and nothing else: token for token what recomputing everything gives."""

import pytest
import torch
from tiny import adapter_weights, batch, blocks, columns, hooked, make

import fastreft
from fastreft.plan.inputs import cached_tokens

pytestmark = pytest.mark.usefixtures("everything_on")

NEW = 6


def greedy(model, weights, inputs, chosen):
    """Greedy decoding of the plain model with no cache: the whole sequence again for every token. None = all tokens."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(NEW):
        now = [list(range(ids.shape[1]))] * len(ids) if chosen is None else chosen
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        with hooked(model, weights, now), torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def build(kind, **config):
    """The PEFT model and a plain one, in fp64 so that no two tokens tie."""
    model = fastreft.get_reft_model(make(kind).double(), fastreft.ReftConfig(task_type="CAUSAL_LM", **config)).double()
    with torch.no_grad():  # a large edit, so that editing a decoded token would show
        for block in blocks(model):
            block.reft.reft_edit["default"].b.mul_(30)
    return model.eval(), make(kind).double()


GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "stories"])
@pytest.mark.parametrize("positions", ["f2+l3", "l1", "prompt"])
def test_cached_generation_is_recomputation(kind, positions):
    model, plain = build(kind, positions=positions)
    inputs = batch("left")
    tokens = inputs["attention_mask"].tolist()
    chosen = {
        "f2+l3": columns(inputs["attention_mask"], 2, 3),
        "l1": [[len(row) - 1] for row in tokens],
        "prompt": [[s for s, shown in enumerate(row) if shown] for row in tokens],
    }[positions]
    wanted = greedy(plain, adapter_weights(model), inputs, chosen)
    assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
    assert not torch.equal(plain.generate(**inputs, **GREEDY), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_edits_every_decoded_token(kind):
    model, plain = build(kind, positions="all")
    inputs = batch("left")
    wanted = greedy(plain, adapter_weights(model), inputs, None)
    assert torch.equal(model.generate(**inputs, **GREEDY), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_explicit_positions_reach_the_prefill_and_the_beams(kind):
    model, plain = build(kind)
    inputs = batch("left")
    chosen = [[3, 8], [6], [0, 4]]
    index = torch.tensor([[3, 8], [6, -1], [0, 4]])
    wanted = greedy(plain, adapter_weights(model), inputs, chosen)
    assert torch.equal(model.generate(**inputs, **GREEDY, reft_positions=index), wanted)
    beams = model.generate(
        **inputs, max_new_tokens=3, num_beams=2, num_return_sequences=2, do_sample=False, reft_positions=index
    )
    assert beams.shape[0] == 6


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_with_content_means_decoding(kind):
    model, plain = build(kind, positions="prompt")
    ids = torch.randint(1, 60, (2, 5))
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        again = plain(input_ids=ids, use_cache=True)
        assert not torch.allclose(first.logits, again.logits)
        step = torch.full((2, 1), 7)
        with model.disable_adapter():
            wanted = model(input_ids=step, past_key_values=again.past_key_values).logits
        again = plain(input_ids=ids, use_cache=True)
        assert torch.equal(model(input_ids=step, past_key_values=again.past_key_values).logits, wanted)


def test_a_legacy_cache_counts_too():
    key = torch.zeros(1, 2, 4, 8)
    assert cached_tokens(((key, key),)) == 4
    assert cached_tokens(()) == cached_tokens((None, None)) == cached_tokens(None) == 0


@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # one mask, or one a kind of layer
def test_generation_with_a_static_cache(kind):
    model, _ = build(kind, positions="f2+l3")
    inputs = batch("left")
    wanted = model.generate(**inputs, **GREEDY)
    found = model.generate(**inputs, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, wanted)
