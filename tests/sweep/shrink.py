"""Builds any architecture small from its own config class, by rules on the names and values of its fields."""

import re
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig

LAYERS = 2
# What a default config leaves open though its own code needs a number.
FILLED = {
    "head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
}
# What no rule can know, each with its reason.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},  # without attention, its cache cannot count
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},  # names layers
    # Its default has no rotary parameters.
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    # The head of its layers with a window is the sum of these two.
    "dots3_note_text": {"per_layer_config": {"1": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8}}},
    "falcon_h1": {"mamba_d_ssm": 64},  # its heads have 8 dimensions
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},  # without attention, its cache cannot count
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},  # open in its default
    "mamba2": {"num_heads": 8, "head_dim": 16},  # Mamba's heads, under the names of attention's
    "qwen4_exp_text": {  # open in its default
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    # The factors of its positions fix the length of all rows; its hashes are drawn anew in each forward.
    "reformer": {"axial_pos_embds": False, "hash_seed": 0},
    "rwkv": {"attention_hidden_size": 64},  # its state has the hidden size
    "xlstm": {"max_inference_chunksize": 512},  # longer rows are computed in pieces, which fails in transformers
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},  # has an adapter for each language
    # These share a block between layers, so there have to be two of a kind.
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
}
# The first rule that matches a field's name, and whose value is a whole number larger than it, decides.
RULES: tuple[tuple[str, int], ...] = (
    (r"vocab_size(_per_layer_input)?|n_vocab|.*_vocab_size", 0),  # 0: the tokenizer's
    # -1: none
    (r"num_nextn_predict_layers|num_hash_layers|mtp_num_hidden_layers|num_kv_shared_layers|n_hash_layers", -1),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers|n_dense_layers|first_.*dense.*", 1),
    (r"(num|n)_(hidden_|encoder_|decoder_)?layers?|num_.*blocks|.*_layers|n_layer|num_layers|depth", LAYERS),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|num_groups", 1),
    (r"index(er)?_topk", 64),  # a whole short row: which of two equal keys is taken would depend on the padding
    (r"num_experts_per_tok(en)?|(moe_)?top_?k(_experts)?|num_selected_experts|experts_top_k|moe_k|.*topk.*", 2),
    (r".*shared_experts?", 1),
    (r"(num|n)_.*experts.*|num_local_experts|moe_num_experts|zero_expert_num", 4),
    (r"rotary_dim|rope_dim", 8),
    (r"n?_?mamba_(n_|num_)?heads|n_mamba_heads", 8),  # times 16 gives what `expand` makes of the hidden size
    (r"mamba_d_ssm|attention_hidden_size", 128),
    (r".*hash.*vocab.*", 64),
    (r".*key_value_heads|n_kv_heads|num_kv_heads|.*num_key_heads|num_query_groups", 2),
    (r".*(num|n)_.*heads?|n_head|.*attention_heads|num_heads", 4),
    (r".*(head_dim|d_head|head_size|attention_head_size|headdim|d_kv|kv_channels|dim_per_head)", 16),
    (r".*_rank|.*lora.*", 16),
    (r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|dim_model|model_dim)(_.*)?|dim", 64),
    (r".*(intermediate|ffn|d_ff|ffn_dim|n_inner|inner_dim|mlp_dim|dim_ff|d_inner|d_state_expand).*", 128),
    (r".*(state_size|d_state|ssm_state|mamba_d_state).*", 8),
    (r".*chunk_size|.*window.*|chunk.*", 32),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length|context_length", 512),
    (r".*(width|channels|dim|size)", 64),
)

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def small_config(kind: type[PretrainedConfig], vocab_size: int, tokens: Mapping[str, int]) -> PretrainedConfig:
    """Shrink the default config of an architecture.

    Args:
        vocab_size: tokens of the tokenizer that it will be used with.
        tokens: ids of special tokens, by the config's names (`eos_token_id`, ...).
    """
    config = kind()
    return kind(**_shrunk(config.to_dict(), vocab_size, tokens))


def _shrunk(values: Mapping[str, Any], vocab_size: int, tokens: Mapping[str, int]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    layers = next((values[key] for key in _COUNTS if isinstance(values.get(key), int)), None)
    for name, value in values.items():
        if name in ("model_type", "transformers_version", "architectures", "dtype"):
            continue
        if name == "per_layer_config" and value:
            small[name] = {str(LAYERS - 1): _shrunk(next(iter(value.values())), vocab_size, tokens)}
        elif isinstance(value, Mapping) and name.endswith("_config"):
            small[name] = _shrunk(value, vocab_size, tokens)
        elif name.endswith(("_token_id", "_token_index")):
            small[name] = tokens.get(name, min(value, vocab_size - 1) if isinstance(value, int) else value)
        elif value is None and name in FILLED:
            small[name] = FILLED[name]
        elif name in ("is_decoder", "causal") and not values.get("is_encoder_decoder"):
            small[name] = True  # BERT and its like are causal only then
        elif isinstance(value, list) and name.endswith(("layer_types", "layers_block_type", "block_types")):
            small[name] = _kinds(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = _number(name, value, vocab_size)
        elif isinstance(value, list) and value and len(value) == layers:
            small[name] = [_number(name, v, vocab_size) if type(v) is int else v for v in value[:LAYERS]]
        else:
            small[name] = value
    if "kv_lora_rank" in small:  # latent attention has a key for every head
        small |= {key: 4 for key in ("num_key_value_heads",) if key in small}
        small |= {key: 32 for key in ("qk_head_dim",) if key in small}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types"):
        if isinstance(small.get(name), list):
            count = next((small[key] for key in _COUNTS if key in small), LAYERS)
            small[name] = (small[name] * count)[:count]
    for name, value in EXCEPTIONS.get(values.get("model_type", ""), {}).items():
        small[name] = small[name] | value if isinstance(value, dict) else value
    return small


def _number(name: str, value: int, vocab_size: int) -> int:
    for pattern, size in RULES:
        if re.fullmatch(pattern, name):
            if size == 0:
                return vocab_size
            if size == -1:
                return 0
            return min(value, size)
    return value


def _kinds(types: list[str]) -> list[str]:
    """Give each kind of layer once, in order: a hybrid stays one."""
    return list(dict.fromkeys(types))[:LAYERS] or types


def causal_types() -> dict[str, type[PretrainedConfig]]:
    """Give the config class of each model type that transformers has a causal language model for."""
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {name: transformers.models.auto.configuration_auto.CONFIG_MAPPING[name] for name in sorted(mapping)}
