"""Tiny random models of every type that Transformers maps to a head: configs shrunk by the names of their fields."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, WIDTH, LAYERS, HEADS, BATCH, LENGTH = 99, 32, 2, 4, 3, 9

torch.set_num_threads(1)

# Kind of head -> the mapping of Transformers that lists its classes.
KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

# Size -> the fields that get it, where their default is a larger number.
_SIZES = [
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth layers",
    ),
    (LAYERS, "num_encoder_layers num_self_attends_per_block"),
    (WIDTH, "hidden_size d_model n_embd dim embed_dim emb_dim word_embed_proj_dim embedding_size hidden_dim width"),
    (WIDTH, "lru_width dim_model d_latents num_latents embedding_dim audio_hidden_size ple_embed_dim"),
    (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    (HEADS, "num_encoder_attention_heads num_decoder_attention_heads attention_heads linear_num_heads"),
    (HEADS, "linear_num_value_heads mamba_dt_rank num_local_experts num_experts n_routed_experts moe_num_experts"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk top_k num_experts_per_token moe_k moe_top_k"),
    (2, "linear_num_key_heads zero_expert_num index_topk top_k_experts heads_per_ngram split_ngram_parts"),
    (1, "num_expert_group n_group topk_group n_shared_experts first_k_dense_replace moe_num_shared_experts"),
    (1, "num_shared_experts"),
    (
        8,
        "head_dim d_kv kv_channels attention_head_size d_head q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim",
    ),
    (8, "v_head_dim dim_head global_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim"),
    (8, "hidden_size_per_layer_input laurel_rank mamba_d_state state_size mamba_d_head hc_lowrank index_n_heads"),
    (16, "sliding_window attention_window local_window_size"),
    (48, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner n_inner moe_intermediate_size dim_ff"),
    (48, "shared_expert_intermediate_size shared_intermediate_size ffn_hidden_size intermediate_dim mlp_dim"),
    (48, "expert_ffn_hidden_size feed_forward_size dff intermediate_size_mlp dense_intermediate_size"),
    (48, "moe_shared_expert_intermediate_size shared_experts_intermediate_size speech_encoder_intermediate_size"),
    (48, "t2u_encoder_ffn_dim t2u_decoder_ffn_dim"),
    (64, "max_position_embeddings n_positions max_sequence_length n_ctx max_seq_len max_source_positions"),
    (64, "max_target_positions max_encoder_position_embeddings max_decoder_position_embeddings"),
    (VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input entity_vocab_size src_vocab_size tgt_vocab_size"),
    (VOCAB, "pronunciation_vocab_size shape_vocab_size ngram_vocab_size_base"),
]
_SMALL = {name: size for size, names in _SIZES for name in names.split()}

# What the names alone get wrong, by the model type of a config.
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MAMBA = {"attention_hidden_size": 64, "attention_head_dim": 16, "layers_block_type": ["linear_attention", "hybrid"]}
_DRAFTER = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
_ODD: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_chunk_size": 8},
    "blt": {"encoder_hash_byte_group_vocab": 50, "num_hidden_layers": LAYERS},  # the latter for its cache, which asks
    "blt_local_decoder": {"hidden_size_global": WIDTH},
    "bros": {"hidden_size": 64},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _PLAIN_ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_chunk_size": 8},
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0]},
    "gemma4_assistant": {"text_config": _DRAFTER | {"model_type": "gemma4_text"}},
    "gemma4_unified_assistant": {"text_config": _DRAFTER | {"model_type": "gemma4_unified_text"}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_chunk_size": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "visual_embed": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_emb_size": 16},
    "mistral4": {
        "rope_parameters": _PLAIN_ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
    },
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "ministral": {"head_dim": 8},
    "neomme": {"head_dim": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "t5": {"decoder_start_token_id": 0},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "vit": {"image_size": 16, "patch_size": 8},
    "whisper": {"num_mel_bins": 8, "begin_suppress_tokens": None, "suppress_tokens": None},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": _MAMBA | {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": _MAMBA | {"chunk_size": 8},
}

_NO_DEFAULT = {"gemma4_assistant", "gemma4_unified_assistant"}  # their own default is refused by their own check

# Other classes, of kinds that are not enumerated, by model type.
_MORE = {
    "clip_text_model": {"text": "CLIPTextModel"},
    "vit": {"image": "ViTForImageClassification"},
    "whisper": {"speech": "WhisperForConditionalGeneration"},
}


def classes() -> Iterator[tuple[str, str, str]]:
    """(model type, kind of head, class name) of every class of the mappings and a few more, by model type."""
    found: dict[str, dict[str, str]] = {}
    for kind, mapping in KINDS.items():
        for model_type, name in mapping.items():
            found.setdefault(model_type, {})[kind] = name if isinstance(name, str) else name[0]
    for model_type, more in _MORE.items():
        found.setdefault(model_type, {}).update(more)
    for model_type in sorted(found):
        for kind, name in found[model_type].items():
            yield model_type, kind, name


def shrink(config_class: Any) -> dict[str, Any]:
    """The keywords of a config of this class with every size made small."""
    odd = _ODD.get(config_class.model_type, {})
    default = config_class(**odd) if config_class.model_type in _NO_DEFAULT else config_class()
    fields = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    every_head = fields.get("num_key_value_heads") == fields.get("num_attention_heads")
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, transformers.PretrainedConfig):
            found[name] = type(value)(**shrink(type(value)))
        elif "drop" in name and isinstance(value, float):
            found[name] = 0.0
        elif name in ("layer_types", "mlp_layer_types") and value:
            found[name] = _two_kinds(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            if name in _SMALL:
                small = HEADS if name == "num_key_value_heads" and every_head else _SMALL[name]
                found[name] = min(small, value)
            elif name.endswith("token_id") and value >= VOCAB:
                found[name] = 50 + len(found) % 40
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    found |= {name: value for name, value in special.items() if name in fields}
    return found | odd


def _two_kinds(kinds: list[str]) -> list[str]:
    """Two layers of different kinds where there are such; full attention last, as caches want one."""
    other = [kind for kind in dict.fromkeys(kinds) if kind != "full_attention"]
    chosen = [*other[:1], "full_attention"] if "full_attention" in kinds else other[:2]
    return (chosen * LAYERS)[:LAYERS]


def build(model_type: str, kind: str, class_name: str) -> Any:
    """A tiny random model in eval mode."""
    model_class = getattr(transformers, class_name)
    config_class = model_class.config_class or CONFIG_MAPPING[model_type]
    config = config_class(**shrink(config_class))
    if kind == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    if model_type == "encoder-decoder":
        config.decoder.is_decoder = config.decoder.add_cross_attention = True
    torch.manual_seed(0)
    model = model_class(config).eval()
    if model_type.startswith("musicgen"):  # the token that pads its codebooks, one more than the codes
        model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = VOCAB
        model.generation_config.num_return_sequences = 1
    return model


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Token ids and their mask, padded on the right, and what else the model wants; or a picture, or sound."""
    torch.manual_seed(1)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 16, 16)}
    if model.main_input_name == "input_features" and model.config.model_type == "whisper":
        sound = torch.randn(BATCH, 8, 2 * model.config.max_source_positions)
        return {"input_features": sound, "decoder_input_ids": torch.randint(5, 45, (BATCH, 4))}
    mask = (torch.arange(LENGTH) < torch.tensor([7, LENGTH, 4])[:, None]).long()
    found = {"input_ids": torch.randint(5, 45, (BATCH, LENGTH)) * mask, "attention_mask": mask}
    found["input_ids"][torch.arange(BATCH), mask.sum(1) - 1] = 2  # some classifiers look for the end of the sequence
    if "bbox" in inspect.signature(model.forward).parameters:
        corner = torch.randint(0, 20, (BATCH, LENGTH, 2))
        found["bbox"] = torch.cat([corner, corner + 5], -1)
    if model.config.model_type.startswith("musicgen"):
        found["input_ids"] = found["input_ids"].repeat_interleave(model.config.num_codebooks, 0)
    if model.config.model_type == "voxtral_realtime":  # as much sound as there are tokens
        audio = model.config.audio_config
        found["input_features"] = torch.randn(BATCH, audio.num_mel_bins, LENGTH * 2 * model.config.downsample_factor)
    if model.config.is_encoder_decoder and model.can_generate():
        found["decoder_input_ids"] = torch.randint(5, 45, (BATCH, 4))
    return found


def prompt(model: Any) -> dict[str, torch.Tensor]:
    """What ``generate`` is given: the inputs, but for the decoder's, and sound for the tokens to come as well."""
    found = {name: value for name, value in inputs(model).items() if not name.startswith("decoder_")}
    if model.config.model_type == "voxtral_realtime":
        found["input_features"] = found["input_features"].repeat(1, 1, 2)
    return found
