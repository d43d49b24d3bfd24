"""Encoder-decoders made of two models, whose decoder is given by another name what the whole is."""

import pytest
import torch
from tiny import VOCAB, batch
from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel

from fastreft import ReftConfig, get_reft_model, reference

WRITTEN = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)


def made():
    torch.manual_seed(0)
    shape = dict(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, initializer_range=0.2
    )
    shape |= dict(vocab_size=VOCAB, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = BertModel(BertConfig(**shape), add_pooling_layer=False)
    decoder = BertLMHeadModel(BertConfig(**shape, is_decoder=True, add_cross_attention=True))
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id = 1, 0
    model.generation_config.eos_token_id = None
    return model


def written(plain, inputs, edits):
    """Greedy, all of it again for each token, the first column of the decoder edited."""

    def hook_of(m):
        def hook(_block, _args, output):
            h = output if isinstance(output, torch.Tensor) else output[0]
            h = reference.edit_rows(h, torch.arange(0, h.shape[0] * h.shape[1], h.shape[1]), m.R, m.W, m.R, m.b)
            return h if isinstance(output, torch.Tensor) else (h, *output[1:])

        return hook

    for block, m in zip(plain.decoder.bert.encoder.layer, edits, strict=True):
        block.register_forward_hook(hook_of(m))
    ids = torch.ones(3, 1, dtype=torch.long)
    for _ in range(4):
        with torch.no_grad():
            logits = plain(**inputs, decoder_input_ids=ids).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("positions", ["l1", "f1", "prompt"])
def test_what_the_decoder_writes(positions):
    inputs = batch("right")
    config = ReftConfig(r=3, positions=positions, target_modules=r"decoder\.bert\.encoder\.layer\.\d+")
    torch.manual_seed(2)
    model = get_reft_model(made(), config)
    edits = [block.reft.reft_edit["default"] for block in model.get_base_model().decoder.bert.encoder.layer]
    with torch.no_grad():
        for m in edits:
            m.b.normal_().mul_(3)
    wanted = written(made(), inputs, edits)
    assert not torch.equal(made().generate(**inputs, **WRITTEN), wanted)
    for use_cache in (True, False):
        assert torch.equal(model.generate(**inputs, **WRITTEN, use_cache=use_cache), wanted)


@pytest.mark.parametrize("positions", ["d2", "1:3"])
def test_tokens_edited_by_their_number(positions):
    """The decoder's own start is the token 0, and no written one: both are the first two that are written."""
    inputs = batch("right")
    torch.manual_seed(2)
    config = ReftConfig(r=3, positions=positions, target_modules=r"decoder\.bert\.encoder\.layer\.\d+")
    model = get_reft_model(made(), config)
    for block in model.get_base_model().decoder.bert.encoder.layer:
        block.reft.reft_edit["default"].b.data.normal_().mul_(3)
    ids = torch.ones(3, 1, dtype=torch.long)
    for _ in range(4):
        with torch.no_grad():  # by the labels, as in training
            given = {"decoder_input_ids": ids, "labels": torch.cat([ids[:, 1:], ids[:, :1]], 1)}
            ids = torch.cat([ids, model(**inputs, **given).logits[:, -1:].argmax(-1)], 1)
    assert not torch.equal(made().generate(**inputs, **WRITTEN), ids)
    for use_cache in (True, False):
        assert torch.equal(model.generate(**inputs, **WRITTEN, use_cache=use_cache), ids)
