"""The work that every server is given: a real model, and prompts whose answers are known to be long enough.

A prompt is taken only where the model's own greedy answer does not end before `max_tokens`. All servers then produce
the same number of tokens, whether they can be told to ignore the end of a turn or not.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from measuring.work import SEED, Words

SHORTEST, MEDIAN, LONGEST = 30, 90, 300  # tokens of a prompt
# Every conversation has one: without it, this model's own template would add another.
SYSTEM = "You answer at length."
TASK = "Write a long story. Use these words: "
BATCH = 16


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer, its length in tokens, and what transformers' `generate` answers (greedy, fp32)."""

    messages: list[dict[str, str]]
    tokens: int
    answer: str


def build_model(gguf: Path, prompt_format: Mapping[str, Any], cache: Path) -> Path:
    """Write the model of a GGUF file as fp32 safetensors with its tokenizer, once; llmforge's format lies beside them.

    Args:
        prompt_format: what `prompt_format.yaml` is to hold.
    """
    directory = cache / "models" / f"{gguf.stem}-fp32"
    if not (directory / "done").is_file():
        import torch
        import transformers

        packed = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are dense now
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(packed.state_dict())
        model.tie_weights()
        model.generation_config = packed.generation_config
        model.save_pretrained(directory)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
        (directory / "done").touch()
    (directory / "prompt_format.yaml").write_text(json.dumps(prompt_format, indent=1))  # JSON is YAML
    return directory


def build_first_layer(model: Path, prompt_format: Mapping[str, Any]) -> Path:
    """Write a model's embeddings, its first layer and its head as a model, once: next to no time to compute."""
    directory = model.with_name(f"{model.name}-first-layer")
    if not (directory / "done").is_file():
        import torch
        import transformers

        whole = transformers.AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=1, dtype=torch.float32)
        whole.save_pretrained(directory)
        transformers.AutoTokenizer.from_pretrained(model).save_pretrained(directory)
        (directory / "done").touch()
    (directory / "prompt_format.yaml").write_text(json.dumps(prompt_format, indent=1))
    return directory


def build_prompts(model: Path, count: int, max_tokens: int, cache: Path) -> list[Prompt]:
    """Make prompts of realistic lengths, with their answers, once: the same on every machine up to rounding."""
    recipe = [SEED, count, max_tokens, SHORTEST, MEDIAN, LONGEST, SYSTEM, TASK, model.name]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    path = cache / "rows" / f"prompts-{key}.json"
    if not path.is_file():
        prompts = _make(model, count, max_tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(prompt) for prompt in prompts]))
    return [Prompt(**prompt) for prompt in json.loads(path.read_text())]


def _make(directory: Path, count: int, max_tokens: int) -> list[Prompt]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    random = np.random.default_rng(SEED)
    words = Words(tokenizer)
    overhead = len(_ids(tokenizer, _messages("")))
    prompts: list[Prompt] = []
    while len(prompts) < count:
        wanted = np.clip(random.lognormal(math.log(MEDIAN), 0.8, BATCH), SHORTEST, LONGEST).astype(int)
        batch = [_messages(words.text(random, max(1, tokens - overhead))) for tokens in wanted]
        ids = [_ids(tokenizer, messages) for messages in batch]
        padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        with torch.inference_mode():
            output_BT = model.generate(**padded, max_new_tokens=max_tokens, do_sample=False)
        for messages, prompt, row in zip(
            batch, ids, output_BT[:, padded["input_ids"].shape[1] :].tolist(), strict=True
        ):
            if len(row) == max_tokens and tokenizer.eos_token_id not in row:
                prompts.append(Prompt(messages, len(prompt), tokenizer.decode(row)))
    return prompts[:count]


def _messages(words: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TASK + words}]


def _ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
