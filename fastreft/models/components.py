"""The parts of a block, by our names. Imports nothing, so that a command line may ask."""

# Component -> what it is called within a block, the first that is there; a dotted name is a path.
COMPONENTS = {
    "mlp_output": (
        "mlp feed_forward ffn ff block_sparse_moe moe mlp_block layer.2.DenseReluDense layer.1.DenseReluDense layer.1.mlp "
        "layer.2.mlp ffn_output fc2 output.dense"
    ).split(),
    "attention_output": (
        "self_attn attn attention self_attention self_att rel_attn multi_head_attention layer.0.SelfAttention "
        "layer.0.LocalSelfAttention layer.0.TransientGlobalSelfAttention norm_attn_norm.attn linear_attn temporal_block "
        "fourier"
    ).split(),
}
