"""Tokens edited by their number, ``dK`` and ``a:b``: as recomputing everything says, and no work once they are past."""

import copy
from functools import lru_cache

import pytest
import torch
import transformers
from recomputed import GREEDY, NEW, SHOWN, Case, check, plain_of, prompts

from fastreft import ReftConfig

WIDTH = 9
# Of prompts of 7, 4 and 9 tokens: windows that end in one's prompt, among what another writes; that begin there; that never end.
KINDS = ["d1", "d3", "2:11", "10:12", "1:", "8:", ":6"]
SIDES = ["none", "left"]


@lru_cache
def case(family, positions):
    return Case(family, positions)


@lru_cache
def greedy(positions, side="left", family="llama"):
    made = case(family, positions)
    inputs, lengths = prompts(side)
    chosen = made.chosen(lengths, side, WIDTH)
    wanted = made.greedy(inputs, chosen)
    assert not torch.allclose(made.greedy(inputs, [[]] * 3)[1], wanted[1], rtol=1e-3)
    return made, inputs, chosen, wanted


def last(inputs, wanted):
    """The last sample alone, which has no padding."""
    return {name: value[2:] for name, value in inputs.items()}, (wanted[0][2:], wanted[1][:, 2:])


@pytest.mark.parametrize("positions", KINDS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "how",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["cached", "uncached", "chunked", "static"],
)
def test_greedy(positions, side, how):
    made, inputs, _, wanted = greedy(positions, side)
    check(made.model.generate(**inputs, **SHOWN, **how), wanted)


@pytest.mark.parametrize("positions", KINDS)
def test_embeddings(positions):
    made, inputs, _, (ids, logits) = greedy(positions)
    embedded = made.model.get_input_embeddings()(inputs["input_ids"]).detach()
    found = made.model.generate(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], **SHOWN)
    check(found, (ids[:, WIDTH:], logits))


@pytest.mark.parametrize("positions", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_beams(positions, side):
    made = case("gpt2", positions)
    inputs, lengths = prompts(side)
    chosen = made.chosen(lengths, side, WIDTH)
    beams = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(made.model.generate(**inputs, **beams), made.generated(chosen, **inputs, **beams))


@pytest.mark.parametrize("positions", ["d3", "2:11", "8:"])
def test_a_prefix_cache_and_a_second_turn(positions):
    made, inputs, chosen, wanted = greedy(positions)
    one, wanted = last(inputs, wanted)
    cache = transformers.DynamicCache(config=made.model.config)
    with torch.no_grad():  # the prompt's first tokens have the same numbers by themselves
        made.model(input_ids=one["input_ids"][:, :4], past_key_values=cache)
    first = made.model.generate(**one, **SHOWN, past_key_values=cache)
    check(first, wanted)
    torch.manual_seed(6)
    second = torch.cat([first.sequences, torch.randint(2, 60, (1, 4))], 1)
    turn = {"input_ids": second, "attention_mask": torch.ones_like(second)}
    seen, width = cache.get_seq_length(), second.shape[1]
    now = made.chosen([width], "none", width)[0]
    wanted = made.greedy(turn, [[s for s in chosen[2] if s < seen] + [s for s in now if s >= seen]])
    check(made.model.generate(**turn, **SHOWN, past_key_values=cache), wanted)


@pytest.mark.parametrize("positions", ["d2", "d3", "10:12", "8:"])
def test_drafts(positions):
    """Of another model few are kept, of the model itself all: a draft that goes on has the numbers that it had."""
    made, inputs, _, wanted = greedy(positions)
    one, wanted = last(inputs, wanted)
    base = made.model.get_base_model()
    for assistant in (plain_of("llama"), base):
        check(made.model.generate(**one, **SHOWN, assistant_model=assistant), wanted)
    check(made.model.generate(**one, **SHOWN, prompt_lookup_num_tokens=3), wanted)
    two = copy.deepcopy(made.model).get_base_model()  # another's forwards tell nothing of this one's
    drafting = dict(num_assistant_tokens=2, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0)
    two.generation_config.update(**drafting)
    verified = []
    handle = base.lm_head.register_forward_hook(lambda _module, args, _logits: verified.append(args[0].shape[1]))
    try:
        check(made.model.generate(**one, **SHOWN, assistant_model=two), wanted)
    finally:
        handle.remove()
    assert verified == [3, 2]


@pytest.mark.parametrize("positions", ["d3", "2:11", "8:"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_static_cache_with_compile(positions, fullgraph):
    made, inputs, _, wanted = greedy(positions)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    config = transformers.CompileConfig(backend=backend, mode=None, fullgraph=fullgraph)
    config._compile_all_devices = True
    torch._dynamo.reset()
    check(made.model.generate(**inputs, **SHOWN, cache_implementation="static", compile_config=config), wanted)
    assert 0 < len(graphs) <= 4
