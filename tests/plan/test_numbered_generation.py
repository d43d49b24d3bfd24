"""Tokens edited by their number, ``dK`` and ``a:b``: as recomputing everything says, and no work once they are past."""

import copy
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
import transformers
from recomputed import GREEDY, NEW, SHOWN, Case, check, plain_of, prompts
from tiny import make

from fastreft import ReftConfig, get_reft_model

WIDTH = 9
# Of prompts of 7, 4 and 9 tokens: windows that end in one's prompt, or among what another writes, begin there, never end.
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


def one_block(positions):
    """For the compiler, which takes the time."""
    torch.manual_seed(2)
    model = get_reft_model(make("llama", num_hidden_layers=1), ReftConfig(positions=positions))
    model.base_model.model.model.layers[0].reft.reft_edit["default"].b.data.normal_().mul_(3)
    return model.eval()


def test_a_static_cache_with_compile():
    """A graph for the steps of which all tokens are meant, or none, made and kept, and one for those of some samples."""
    model = one_block("2:11")
    inputs, _ = prompts("left")
    wanted = model.generate(**inputs, **SHOWN | {"max_new_tokens": 12})
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    config = transformers.CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    how = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 12}
    check(model.generate(**inputs, **SHOWN | how), (wanted.sequences, torch.stack(wanted.logits)))
    assert 3 <= len(graphs) <= 5


@pytest.mark.parametrize("positions", ["decode", *KINDS])
def test_training_edits_the_tokens_that_generate_does(positions):
    made = case("llama", positions)
    inputs, lengths = prompts("left")
    found = made.model.generate(**inputs, **SHOWN)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], 1)
    labels = found.sequences.masked_fill(torch.arange(WIDTH + NEW) < WIDTH, -100)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    made.model.train()
    try:
        given = {"attention_mask": mask, "position_ids": places, "labels": labels}
        logits = made.model(found.sequences, **given).logits[:, WIDTH - 1 : -1]
    finally:
        made.model.eval()
    torch.testing.assert_close(logits.float(), torch.stack(found.logits, 1), rtol=1e-5, atol=1e-5)
    if positions != "decode":
        wanted = [[s for s in columns if s < WIDTH + NEW] for columns in made.chosen(lengths, "left", WIDTH)]
        assert made.model.reft_report().edits[0].columns == wanted


@pytest.mark.parametrize("positions", ["d3", "2:6", "8:"])
def test_generate_takes_the_lengths_of_prompts(positions):
    """Written is what comes after them: a part of the input, and what is decoded."""
    made = case("llama", positions)
    inputs, lengths = prompts("left")
    own = torch.tensor([3, 2, 4])
    chosen = made.chosen(lengths, "left", WIDTH)
    if positions == "d3":
        chosen = [[WIDTH - n + p + k for k in range(3)] for n, p in zip(lengths, own.tolist(), strict=True)]
        assert chosen[1] == [7, 8, 9]
    wanted = made.generated(chosen, **inputs, **GREEDY)
    for how in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        assert torch.equal(made.model.generate(**inputs, **GREEDY, **how, reft_prompt_lengths=own), wanted)


def by_hand(made, ids, mask, cuts, masked=True):
    """The logits of a sequence run in parts by hand."""
    cache, found = transformers.DynamicCache(config=made.model.config), []
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for a, b in pairwise(cuts):
        more = {"attention_mask": mask[:, :b]} if masked else {}
        found.append(made.model(ids[:, a:b], position_ids=places[:, a:b], past_key_values=cache, **more).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("positions", ["2:11", "10:12", "1:", "8:", ":6"])
@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_windows_of_forwards_by_hand(positions, side):
    made, inputs, _, (ids, logits) = greedy(positions, side)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], 1)
    for cuts in ([0, 9, 10, 11, 12, 13], [0, 6, 11, 13]):
        found = by_hand(made, ids, mask, cuts, masked=side == "left")[:, WIDTH - 1 :]
        torch.testing.assert_close(found.transpose(0, 1), logits)
    cache = transformers.DynamicCache(config=made.model.config)
    made.model(ids[:, :9], past_key_values=cache, attention_mask=mask[:, :9])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 4\); with past_key_values that hold 9 tokens"):
        made.model(ids[:, 9:10], past_key_values=cache, attention_mask=mask[:, :4])


@torch.no_grad()
def test_written_tokens_that_nothing_counts_are_refused():
    made, inputs, _, (ids, _) = greedy("d3", "none")
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match="positions 'd3' count the tokens that are written, and this"):
        by_hand(made, ids, mask, [0, 9, 10])
    with pytest.raises(ValueError, match="positions 'd3' count the tokens that are written"):
        made.model.generate(**inputs, **GREEDY, guidance_scale=2.0)
    with made.model.disable_adapter():
        by_hand(made, ids, mask, [0, 9, 10])


@torch.no_grad()
def test_a_compiled_forward_refuses_them():
    base = one_block("d3").get_base_model()
    ids = prompts("none")[0]["input_ids"]
    cache = transformers.DynamicCache(config=base.config)
    base(ids[:, :8], past_key_values=cache)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="positions 'd3' count the tokens that are written"):
        torch.compile(base, backend="eager")(ids[:, 8:], past_key_values=cache)


@torch.no_grad()
def test_several_adapters():
    """Named for each sample, scaled in a context, or another's positions: each sample as by its adapter alone."""
    torch.manual_seed(0)
    model = get_reft_model(plain_of("llama"), ReftConfig(positions="d2", init_weights="random"), "ada").double().eval()
    for name, positions in {"bob": "6:10", "cid": "f2+l3"}.items():
        model.add_adapter(name, ReftConfig(positions=positions, init_weights="random"))
    model = model.double()
    inputs, _ = prompts("left")
    names = ["ada", "bob", "cid"]
    mixed = model.generate(**inputs, **SHOWN, adapter_names=names)
    for i, name in enumerate(names):
        model.set_adapter(name)
        alone = model.generate(**inputs, **SHOWN)
        assert torch.equal(alone.sequences[i], mixed.sequences[i])
        assert torch.equal(torch.stack(alone.logits)[:, i], torch.stack(mixed.logits)[:, i])
        with model.reft(1.0):
            assert torch.equal(torch.stack(model.generate(**inputs, **SHOWN).logits), torch.stack(alone.logits))
        with model.reft(0.0), model.disable_adapter():
            bare = model.generate(**inputs, **SHOWN)
        assert not torch.equal(torch.stack(bare.logits)[:, i], torch.stack(mixed.logits)[:, i])


def test_explicit_positions_are_all_that_is_edited():
    made, inputs, _, _ = greedy("d3", "none")
    given = torch.tensor([[8], [1], [-1]])
    wanted = made.generated([[8], [1], []], **inputs, **GREEDY)
    assert torch.equal(made.model.generate(**inputs, **GREEDY, reft_positions=given), wanted)


@pytest.mark.parametrize("positions", ["d2", "10:12"])
def test_a_recurrent_model(positions):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.5)
    base = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).double().eval()
    model = get_reft_model(base, ReftConfig(positions=positions)).double().eval()
    for block in model.get_base_model().backbone.layers:
        torch.nn.init.normal_(block.reft.reft_edit["default"].b, std=3)
    inputs, _ = prompts("none")
    found, wanted = (model.generate(**inputs, **SHOWN, use_cache=cached) for cached in (True, False))
    check(found, (wanted.sequences, torch.stack(wanted.logits)))
    with model.disable_adapter():
        bare = model.generate(**inputs, **SHOWN)
    changed = [not torch.allclose(a, b) for a, b in zip(bare.logits, found.logits, strict=True)]
    assert changed.index(True) == (1 if positions == "d2" else 2)
