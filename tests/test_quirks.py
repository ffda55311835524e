"""What mends a model that transformers breaks, and whether transformers still does."""

import peft
import pytest
import torch
import transformers
from transformers import ReformerConfig

from llmforge.models.quirks import mend


def adapted_reformer(*, mended: bool) -> peft.PeftModel:
    config = ReformerConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=2, attention_head_size=16, feed_forward_size=32,
        attn_layers=["local", "lsh"], axial_pos_embds=False, is_decoder=True, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    if mended:
        mend(model)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")).train()


def test_gradients_reach_adapters_in_reversible_layers() -> None:
    ids_BT = torch.arange(16).reshape(2, 8)
    with pytest.raises(RuntimeError, match="does not require grad"):  # else the quirk is no longer needed: delete it
        adapted_reformer(mended=False)(input_ids=ids_BT).logits.sum().backward()
    model = adapted_reformer(mended=True)
    model(input_ids=ids_BT).logits.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
