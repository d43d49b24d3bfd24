"""What a forward can be given beside a padded prompt: packed rows, labels for the positions alone, copies, decode steps."""

import copy
import pickle
import warnings

import pytest
import torch
from recomputed import GREEDY, SEQ2SEQ, SHOWN, Case, check, prompts
from torch.utils._python_dispatch import TorchDispatchMode

FAMILIES = ["llama", "gpt2", "mistral"]


def decode_case(family):
    """positions="decode", for which Case.chosen is not asked."""
    return Case(family, "decode")


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_edits_what_is_written_and_not_the_prompt(family):
    made = decode_case(family)
    inputs, _ = prompts("left")
    check(made.model.generate(**inputs, **SHOWN), made.greedy(inputs, [[]] * 3, written=9))


def test_decode_edits_the_labelled_tokens_in_training():
    made = decode_case("llama")
    inputs, _ = prompts("none")
    labels = inputs["input_ids"].clone()
    labels[:, :6] = -100
    with made.edited([[6, 7, 8]] * 3) as plain:
        wanted = plain(**inputs, labels=labels)
    found = made.model(**inputs, labels=labels)
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(found.loss, wanted.loss)


@pytest.mark.parametrize("positions", ["f2+l3", "l1", "prompt", "d1", "1:", "2:5"])
@pytest.mark.parametrize("labelled", [False, True])
def test_packed_samples_are_edited_as_they_are_apart(positions, labelled):
    made = Case("llama", positions)
    torch.manual_seed(3)
    lengths = [7, 4, 9]
    samples = [torch.randint(2, 30, (1, n)) for n in lengths]
    answers = [s.clone() for s in samples]
    for answer, n in zip(answers, lengths, strict=True):
        answer[:, : n - 2] = -100
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    extra = {"labels": torch.cat(answers, 1)} if labelled else {}
    with torch.no_grad():
        packed = made.model(input_ids=torch.cat(samples, 1), position_ids=places, use_cache=False, **extra).logits
        apart = [
            made.model(input_ids=s, use_cache=False, **({"labels": a} if labelled else {})).logits
            for s, a in zip(samples, answers, strict=True)
        ]
    torch.testing.assert_close(packed, torch.cat(apart, 1))


def test_reft_labels_say_where_the_prompt_ends_when_the_model_gets_none():
    made = Case("llama")
    inputs, _ = prompts("none")
    labels = inputs["input_ids"].clone()
    labels[:, :5] = -100
    made.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = made.model(**inputs, reft_labels=labels)
        assert found.loss is None
        torch.testing.assert_close(found.logits, made.model(**inputs, labels=labels).logits)
    with pytest.warns(UserWarning, match="has no labels, so all of its input is taken as the prompt"):
        assert not torch.allclose(made.model(**inputs).logits, found.logits)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_generates_by_itself(twin):
    made = Case("llama")
    inputs, lengths = prompts("left")
    wanted = made.greedy(inputs, made.chosen(lengths, "left", 9))
    other = twin(made.model)
    with torch.no_grad():
        for edit in made.edits:
            edit.b.zero_()  # the copy has its own
    check(other.generate(**inputs, **SHOWN, prefill_chunk_size=4), wanted)


@pytest.mark.parametrize("family", [*FAMILIES, *SEQ2SEQ])
def test_a_decode_step_runs_the_operations_of_the_bare_model(family):
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    def steps(model, tokens):
        mode = Count()
        mode.calls = 0
        with mode:
            model.generate(**inputs, **GREEDY | {"max_new_tokens": tokens, "min_new_tokens": tokens})
        return mode.calls

    made = Case(family)
    inputs, _ = prompts("none")
    bare, ours = (steps(model, 9) - steps(model, 4) for model in (made.plain, made.model))
    assert ours == bare > 0
