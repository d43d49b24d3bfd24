"""Ways to generate x padding x families of models: each gives the tokens of recomputing everything without a cache."""

from functools import lru_cache

import pytest
import torch
import transformers
from recomputed import GREEDY, NEW, SEQ2SEQ, SHOWN, Case, check, plain_of, prompts

CAUSAL = ["llama", "gpt2", "mistral", "gemma3"]
BEAMS = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
FULL = [("f2+l3", "left"), ("f2+l3", "none"), ("l1", "left"), ("prompt", "left")]


@lru_cache
def case(family, positions="f2+l3"):
    return Case(family, positions)


@lru_cache
def greedy(family, positions="f2+l3", side="left"):
    """The case, its inputs, the columns edited, and the reference's tokens and logits."""
    made = case(family, positions)
    inputs, lengths = prompts(side)
    chosen = made.chosen(lengths, side, 9)
    return made, inputs, chosen, made.greedy(inputs, chosen)


def last_prompt(family, positions="f2+l3"):
    """The same of the last sample alone, which has no padding: some modes take one sample at a time."""
    made, inputs, chosen, (ids, logits) = greedy(family, positions)
    return made, {k: v[2:] for k, v in inputs.items()}, chosen[2:], (ids[2:], logits[:, 2:])


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
@pytest.mark.parametrize(("positions", "side"), FULL)
def test_greedy(family, positions, side):
    side = "right" if (family in SEQ2SEQ and positions == "l1") else side
    made, inputs, chosen, wanted = greedy(family, positions, side)
    check(made.model.generate(**inputs, **SHOWN), wanted)
    bare = made.plain.generate(**inputs, **SHOWN)
    assert not torch.allclose(torch.stack(bare.logits), wanted[1].float(), rtol=1e-3)
    fewer = made.greedy(inputs, [columns[:-1] for columns in chosen])[1]
    assert not torch.allclose(fewer, wanted[1], rtol=1e-3)  # one row too few would show


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
@pytest.mark.parametrize("positions", ["f2+l3", "l1"])
def test_no_cache(family, positions):
    made, inputs, _, wanted = greedy(family, positions)
    check(made.model.generate(**inputs, **SHOWN, use_cache=False), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", ["f2+l3", "l1"])
def test_right_padding(family, positions):
    """Transformers warns of it and goes on from the padding; the edit stays at the prompt's rows."""
    made = case(family, positions)
    inputs, lengths = prompts("right")
    chosen = made.chosen(lengths, "right", 9)
    wanted = made.generated(chosen, **inputs, **SHOWN)
    check(made.model.generate(**inputs, **SHOWN), (wanted.sequences, torch.stack(wanted.logits)))


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_beams(family, side):
    if side == "right" and family not in SEQ2SEQ:
        side = "left"
    made = case(family)
    inputs, lengths = prompts(side)
    chosen = made.chosen(lengths, side, 9)
    assert torch.equal(made.model.generate(**inputs, **BEAMS), made.generated(chosen, **inputs, **BEAMS))


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_seeded_sampling_of_several_sequences(family):
    made, inputs, chosen, _ = greedy(family)
    sampling = GREEDY | {"do_sample": True, "top_k": 20, "num_return_sequences": 3}
    torch.manual_seed(5)
    found = made.model.generate(**inputs, **sampling)
    torch.manual_seed(5)
    assert torch.equal(found, made.generated(chosen, **inputs, **sampling))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("positions", ["f2+l3", "l1", "prompt"])
@pytest.mark.parametrize("size", [1, 4, 20])
def test_prefill_in_chunks(family, positions, size):
    made, inputs, _, wanted = greedy(family, positions)
    check(made.model.generate(**inputs, **SHOWN, prefill_chunk_size=size), wanted)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("positions", ["f2+l3", "l1"])
@pytest.mark.parametrize("edited", [False, True])
def test_a_prefix_cache_stays_as_computed(family, positions, edited):
    made, one, chosen, _ = last_prompt(family, positions)
    cache = transformers.DynamicCache(config=made.model.config)
    prefix = {"input_ids": one["input_ids"][:, :4], "past_key_values": cache}
    with torch.no_grad():
        (made.model if edited else made.plain)(**prefix)
    inside = made.chosen([4], "none", 4)[0] if edited else []  # a forward of its own, whose prompt was the prefix
    wanted = made.greedy(one, [inside + [s for s in chosen[0] if s >= 4]])
    check(made.model.generate(**one, **SHOWN, past_key_values=cache), wanted)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("positions", ["f2+l3", "l1", "prompt"])
def test_a_second_turn_edits_what_is_new_of_its_prompt(family, positions):
    made, one, chosen, (ids, _) = last_prompt(family, positions)
    first = made.model.generate(**one, **SHOWN)
    seen = first.past_key_values.get_seq_length()
    assert seen == 9 + NEW - 1
    torch.manual_seed(6)
    second = torch.cat([first.sequences, torch.randint(2, 60, (1, 4))], 1)
    inputs = {"input_ids": second, "attention_mask": torch.ones_like(second)}
    now = made.chosen([second.shape[1]], "none", second.shape[1])[0]
    wanted = made.greedy(inputs, [chosen[0] + [s for s in now if s >= seen]])
    assert torch.equal(first.sequences, ids)
    check(made.model.generate(**inputs, **SHOWN, past_key_values=first.past_key_values), wanted)


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
@pytest.mark.parametrize("positions", ["f2+l3", "l1"])
def test_a_static_cache(family, positions):
    made, inputs, _, wanted = greedy(family, positions)
    check(made.model.generate(**inputs, **SHOWN, cache_implementation="static", disable_compile=True), wanted)


@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_static_cache_with_compile(family, fullgraph):
    """As generate does it by itself on a GPU: the prefill eager, the decode steps compiled."""
    made, inputs, _, wanted = greedy(family)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    config = transformers.CompileConfig(backend=backend, mode=None, fullgraph=fullgraph)
    config._compile_all_devices = True
    torch._dynamo.reset()
    check(made.model.generate(**inputs, **SHOWN, cache_implementation="static", compile_config=config), wanted)
    assert graphs


def test_a_static_cache_with_inductor():
    """What generate compiles with where nobody says otherwise."""
    made, inputs, _, wanted = greedy("llama")
    config = transformers.CompileConfig(mode=None, fullgraph=False)
    config._compile_all_devices = True
    torch._dynamo.reset()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    check(made.model.generate(**inputs, **SHOWN, cache_implementation="static", compile_config=config), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled


def test_a_compiled_forward():
    made, inputs, _, wanted = greedy("gpt2")
    base = made.model.get_base_model()
    torch._dynamo.reset()
    base.forward = torch.compile(base.forward, backend="eager")
    try:
        check(made.model.generate(**inputs, **SHOWN), wanted)
    finally:
        del base.forward


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_sequences_that_end_early(family):
    made, inputs, chosen, (ids, _) = greedy(family)
    ending = GREEDY | {"eos_token_id": int(ids[0, -NEW + 1]), "max_new_tokens": 9}
    assert torch.equal(made.model.generate(**inputs, **ending), made.generated(chosen, **inputs, **ending))
    beams = ending | {"num_beams": 3, "early_stopping": True}
    assert torch.equal(made.model.generate(**inputs, **beams), made.generated(chosen, **inputs, **beams))


def test_continuous_batching_is_refused_in_the_callers_thread():
    made, inputs, _, wanted = greedy("llama")
    base = made.model.get_base_model()
    with pytest.raises(ValueError, match="continuous batching runs the tokens of several requests"):
        made.model.generate(**inputs, **GREEDY, cache_implementation="paged")
    with pytest.raises(ValueError, match="continuous batching runs the tokens of several requests"):
        base.generate_batch([[3, 4, 5]], max_new_tokens=2)
    check(made.model.generate(**inputs, **SHOWN), wanted)


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
@pytest.mark.parametrize("positions", ["f2+l3", "l1"])
def test_assisted(family, positions):
    """Drafts are run several at a time; few of another model's are kept, all of the model's own."""
    made, one, _, wanted = last_prompt(family, positions)
    for assistant in (plain_of(family), made.model.get_base_model()):
        check(made.model.generate(**one, **SHOWN, assistant_model=assistant), wanted)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("positions", ["f2+l3", "l1"])
def test_prompt_lookup(family, positions):
    made = case(family, positions)
    ids = torch.tensor([[7, 8, 9, 10, 7, 8, 9, 10, 7]])  # whose pairs come again, so that there are drafts
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = made.greedy(one, made.chosen([9], "none", 9))
    check(made.model.generate(**one, **SHOWN, prompt_lookup_num_tokens=3), wanted)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("positions", ["f2+l3", "l1"])
@pytest.mark.parametrize("masked", [True, False])
def test_embeddings(family, positions, masked):
    side = "left" if masked else "none"
    made, inputs, _, (ids, logits) = greedy(family, positions, side)
    given = {"inputs_embeds": made.model.get_input_embeddings()(inputs["input_ids"]).detach()}
    if masked:
        given["attention_mask"] = inputs["attention_mask"]
    check(made.model.generate(**given, **SHOWN), (ids[:, 9:], logits))


@pytest.mark.parametrize("family", CAUSAL)
def test_the_mask_that_generate_infers(family):
    made, inputs, _, wanted = greedy(family)
    check(made.model.generate(inputs["input_ids"], **SHOWN), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_pipeline(family):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    made, inputs, _, (ids, _) = greedy(family)
    shown = inputs["attention_mask"].bool()
    texts = [
        " ".join(f"w{t}" for t in row[seen].tolist()) for row, seen in zip(inputs["input_ids"], shown, strict=True)
    ]
    pipe = transformers.pipeline("text-generation", made.model, tokenizer=tokenizer, batch_size=3, device="cpu")
    found = pipe(texts, **GREEDY, return_full_text=False)
    written = [" ".join(f"w{t}" for t in row[9:].tolist()) for row in ids]
    got = [out[0]["generated_text"].split() for out in found]
    # Special tokens are not printed.
    assert got == [[w for w in text.split() if w != "w0"] for text in written]


def test_guidance_without_a_cache_is_refused():
    made, inputs, _, _ = greedy("llama")
    with pytest.raises(ValueError, match="guidance_scale is given with use_cache=False"):
        made.model.generate(**inputs, **GREEDY, guidance_scale=2.0, use_cache=False)
    made.model.generate(**inputs, **GREEDY, guidance_scale=1.0, use_cache=False)
