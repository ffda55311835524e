"""Writes a Hugging Face directory of a Llama as one of LitGPT: `litgpt_convert.py MODEL DIRECTORY`."""

import json
import shutil
import sys
from pathlib import Path

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import save_config
from safetensors.torch import load_file

source, target = Path(sys.argv[1]), Path(sys.argv[2])
target.mkdir(parents=True, exist_ok=True)
settings = json.loads((source / "config.json").read_text())
rope = settings.get("rope_parameters") or settings
config = Config(
    name="bench",
    block_size=settings["max_position_embeddings"],
    vocab_size=settings["vocab_size"],
    padded_vocab_size=settings["vocab_size"],
    n_layer=settings["num_hidden_layers"],
    n_head=settings["num_attention_heads"],
    n_query_groups=settings["num_key_value_heads"],
    n_embd=settings["hidden_size"],
    intermediate_size=settings["intermediate_size"],
    rotary_percentage=1.0,
    rope_base=int(rope["rope_theta"]),
    norm_class_name="RMSNorm",
    norm_eps=settings["rms_norm_eps"],
    mlp_class_name="LLaMAMLP",
    parallel_residual=False,
    bias=False,
)
weights = {}
for file in sorted(source.glob("*.safetensors")):
    weights |= load_file(file)
weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
converted = {}
copy_weights_hf_llama(config, {}, converted, weights)
with torch.device("meta"):
    model = GPT(config)
model.load_state_dict(converted, strict=True, assign=True)
torch.save(converted, target / "lit_model.pth")
save_config(config, target)
for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    if (source / name).is_file():
        shutil.copy(source / name, target / name)
