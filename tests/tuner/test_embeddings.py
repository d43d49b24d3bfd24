"""Embeddings in an adapter's file: the rows of words that the base lacks are loaded, and the base's own stay."""

import pytest
import torch
from damaged import adapted
from peft import PeftModel
from tiny import batch, logits, make

from fastreft import ReftConfig, get_reft_model
from fastreft.tuner import embeddings

WORDS, GROWN = 61, 66


@pytest.fixture
def source(tmp_path):
    """A base with a checkpoint of its own."""
    make("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def grown(source=None, seed=3):
    base = make("llama") if source is None else type(make("llama")).from_pretrained(source)
    torch.manual_seed(seed)
    base.resize_token_embeddings(GROWN, mean_resizing=False)
    return base


def saved(base, folder, change=None, **how):
    torch.manual_seed(2)
    model = get_reft_model(base, ReftConfig(r=3, positions="f2+l3"))
    for table in (base.get_input_embeddings(), base.get_output_embeddings()):
        if change is not None:
            change(table.weight.data)
    model.save_pretrained(folder, save_embedding_layers=True, **how)
    return model


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("by", ["PEFT", "Transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_words_are_loaded_and_the_others_stay(known, by, dtype, source, tmp_path):
    of = source if known else None
    wanted = logits(saved(grown(of), tmp_path / "a"), batch())
    if dtype is not torch.float32:
        saved(grown(of).to(dtype), tmp_path / "a")
    base = grown(of, seed=8)
    own = base.get_input_embeddings().weight
    before = own.detach().clone()
    if by == "PEFT":
        model = PeftModel.from_pretrained(base, tmp_path / "a")
    else:
        base.load_adapter(str(tmp_path / "a"))
        model = base
    assert torch.equal(own[:WORDS], before[:WORDS]) and not torch.equal(own[WORDS:], before[WORDS:])
    assert base.get_input_embeddings().weight is own
    torch.testing.assert_close(
        logits(model, batch()), wanted, **({} if dtype is torch.float32 else {"atol": 0.2, "rtol": 0.1})
    )


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("by", ["PEFT", "Transformers"])
def test_other_values_for_the_bases_words_are_refused(known, by, source, tmp_path):
    of = source if known else None
    saved(grown(of), tmp_path / "a", change=lambda t: t[3].add_(1))
    base = grown(of, seed=8)
    before = base.get_input_embeddings().weight.detach().clone()
    with pytest.raises(ValueError, match="other values for the words that the base has"):
        PeftModel.from_pretrained(base, tmp_path / "a") if by == "PEFT" else base.load_adapter(str(tmp_path / "a"))
    assert torch.equal(base.get_input_embeddings().weight, before)


def test_a_vocabulary_that_has_not_grown_has_no_new_words(source, tmp_path):
    base = type(make("llama")).from_pretrained(source)
    saved(base, tmp_path / "same")
    PeftModel.from_pretrained(type(base).from_pretrained(source), tmp_path / "same")  # its own are no harm
    saved(type(base).from_pretrained(source), tmp_path / "other", change=lambda t: t[-1].add_(1))
    with pytest.raises(ValueError, match="other values for the words that the base has"):
        PeftModel.from_pretrained(type(base).from_pretrained(source), tmp_path / "other")


def test_the_words_of_a_checkpoint(source):
    base = type(make("llama")).from_pretrained(source)
    base.resize_token_embeddings(GROWN, mean_resizing=False)
    assert embeddings.vocabulary_of(base) == WORDS
    assert embeddings.vocabulary_of(make("llama")) is None
    assert embeddings.names_of(adapted().get_base_model()) == ["model.embed_tokens", "lm_head"]
