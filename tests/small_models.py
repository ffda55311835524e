"""Small models of many kinds in float64, for equalities that hold to rounding.

RMSNorm in transformers computes in fp32 whatever it is given; where a comparison is finer than that, PyTorch's takes
its place, which computes the same in the precision of its input.
"""

from typing import Any

import torch
import transformers

VOCABULARY = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GEMMA = {**SMALL, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "n_inner": 48}
KINDS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "tied embeddings": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "a sliding window": lambda: transformers.MistralConfig(**SMALL, sliding_window=7, head_dim=8),
    "soft-capping": lambda: transformers.Gemma2Config(**GEMMA, final_logit_softcapping=5.0),
    "two kinds of layers": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "sinks": lambda: transformers.GptOssConfig(
        **GEMMA,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "a divisor of the logits": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=7.0),
    "a factor of the logits": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.1),
    "a bias": lambda: transformers.PhiConfig(**SMALL),
    "positions that are learnt": lambda: transformers.GPT2Config(
        **OLD, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "keys wider than values": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
    ),
}


# These compute in fp32 only: transformers' eager attention takes its softmax in fp32, experts have no float64 kernel.
IN_FP32 = ("soft-capping", "sinks")


def small_model(kind: str) -> Any:
    """Build one of `KINDS`, every weight of which matters."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind]()).eval()
    if kind not in IN_FP32:
        model.double()
        _in_float64(model)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def _in_float64(model: Any) -> None:
    """Exchange the norms that compute in fp32; Gemma's, whose weight is one less, stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm") and "Gemma" not in type(child).__name__:
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
