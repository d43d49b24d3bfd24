"""Models of sound, whose convolutions give the blocks fewer columns than the attention mask has."""

import pytest
import torch
import transformers

from fastreft import ReftConfig, get_reft_model

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=32)
CONVS = dict(conv_dim=(16, 16), conv_kernel=(4, 3), conv_stride=(2, 2), num_feat_extract_layers=2)
PLACES = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
WAVES = {
    "Wav2Vec2": {},
    "Hubert": {},
    "Wav2Vec2 with adapter": {"add_adapter": True, "output_hidden_size": 32, "num_adapter_layers": 1},
}


def whisper(of="WhisperForConditionalGeneration"):
    torch.manual_seed(0)
    sizes = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    more = dict(encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20, max_target_positions=20)
    special = dict(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    config = transformers.WhisperConfig(**sizes, **more, **special, num_mel_bins=8, suppress_tokens=None)
    model = getattr(transformers, of)(config).eval()
    if hasattr(model, "generation_config"):
        model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    return model


def changed(model, block, positions, run):
    """Sample by sample, the columns of a block's output that an edit of that block alone changes."""
    seen = []
    handle = block.register_forward_hook(
        lambda _m, _a, out: seen.append((out if isinstance(out, torch.Tensor) else out[0]).detach().clone())
    )
    with torch.no_grad():
        run(model)
        made = get_reft_model(model, ReftConfig(positions=positions, layers_to_transform=0))
        run(made)
    handle.remove()
    plain, edited = seen[0], seen[-1] if len(seen) == 2 else seen[len(seen) // 2]
    return [row.nonzero().flatten().tolist() for row in ~torch.isclose(plain, edited).all(-1)]


@pytest.mark.parametrize("way", ["forward", "generate", "encoder"])
def test_whispers_encoder_is_edited_where_the_mask_shows_speech(way):
    features, mask = torch.randn(2, 8, 40), torch.ones(2, 40).long()
    mask[0, 31:] = 0  # 31 frames of mel are 16 columns of the encoder

    def run(model):
        if way == "generate":
            return model.generate(input_features=features, attention_mask=mask, max_new_tokens=3)
        if way == "encoder":
            return model.get_encoder()(features, attention_mask=mask)
        return model(input_features=features, attention_mask=mask, decoder_input_ids=torch.ones(2, 3).long())

    model = whisper()
    found = changed(model, model.model.encoder.layers[0], "f2+l3", run)
    assert found == [[0, 1, 13, 14, 15], [0, 1, 17, 18, 19]]


def test_without_a_mask_all_of_whispers_columns_are_prompt():
    features = torch.randn(2, 8, 40)
    model = whisper("WhisperForAudioClassification")
    found = changed(model, model.encoder.layers[0], "f1+l1", lambda m: m(input_features=features))
    assert found == [[0, 19], [0, 19]]


@pytest.mark.parametrize("name", list(WAVES))
@pytest.mark.parametrize("head", ["Model", "ForCTC"])
def test_waves_are_edited_where_the_mask_shows_them(name, head):
    kind = name.split()[0]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**SMALL, **CONVS, **PLACES, **WAVES[name])
    model = getattr(transformers, kind + head)(config).eval()
    values, mask = torch.randn(2, 60), torch.ones(2, 60).long()
    mask[0, 40:] = 0  # 40 samples are 19 of the first convolution and 9 of the second, 60 are 29 and 14
    given = {"input_values": values * mask, "attention_mask": mask}
    if head == "ForCTC":
        given["labels"] = torch.tensor([[3, 4], [5, 6]])
    block = getattr(model, model.base_model_prefix, model).encoder.layers[0]
    found = changed(model, block, "f2+l3", lambda m: m(**given))
    assert found == [[0, 1, 6, 7, 8], [0, 1, 11, 12, 13]]
