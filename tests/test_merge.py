"""Merging on disk: the same numbers as merging in memory, in far less of it, and what adapter servers cannot serve."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import build_model
from llmforge.errors import ModelError
from llmforge.models.adapter import add_lora, is_tied, merge
from llmforge.models.load import load_base_model, quiet
from llmforge.models.merge import merge_adapter, servability
from llmforge.models.rope import add_old_rope_keys
from llmforge.models.source import ModelSource
from tiny_runs import environment, plain_python

IDS = torch.arange(20, 60).view(2, 20)
LAYERS = ["q_proj", "down_proj"]
ATOL = 1e-5  # fp32 logits of size 1 to 10; merging adds the same numbers in another order
SHARD = 50_000  # bytes: three to five shards

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": LAYERS},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "alpha_pattern": {"q_proj": 3}},
    "dora": {"target_modules": [*LAYERS, "embed_tokens", "lm_head"], "use_dora": True},
    "both embeddings": {"target_modules": [*LAYERS, "embed_tokens", "lm_head"]},
    "input embedding": {"target_modules": [*LAYERS, "embed_tokens"]},
    "output embedding": {"target_modules": [*LAYERS, "lm_head"]},
    "input saved": {"target_modules": LAYERS, "modules_to_save": ["embed_tokens"]},
    "output saved": {"target_modules": LAYERS, "modules_to_save": ["lm_head", "model.norm"]},
    "lora on the input, output saved": {"target_modules": [*LAYERS, "embed_tokens"], "modules_to_save": ["lm_head"]},
    "some tokens": {"target_modules": LAYERS, "trainable_token_indices": [30, 31]},
    "a bare parameter": {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]},
}
DIFFERING = {"dora", "both embeddings", "input embedding", "output embedding", "lora on the input, output saved"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@dataclass
class Saved:
    """A base model and an adapter on disk, and what they compute together in fp32."""

    base: Path
    adapter: Path
    logits: torch.Tensor


def save(directory: Path, model: Any, adapted: Any) -> Saved:
    """Save a base model in shards and an adapter with random weights."""
    with quiet():
        model.save_pretrained(directory / "base", max_shard_size=SHARD)
        peft_model = adapted(model)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        peft_model.save_pretrained(directory / "adapter", save_embedding_layers=False)
        return Saved(directory / "base", directory / "adapter", logits(peft_model.float()))


def merged_in_memory(saved: Saved) -> Any:
    model = load_base_model(ModelSource("base", saved.base), dtype="auto")
    with quiet():
        return merge(peft.PeftModel.from_pretrained(model, saved.adapter))


def reload(directory: Path) -> Any:
    """Load a merged model as plain transformers does; nothing may be missing or left over."""
    with quiet():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", output_loading_info=True
        )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model


def check_same(model: Any, expected: Any) -> None:
    """Check that two models are the same, number for number."""
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


# --- the same as in memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_equals_the_merge_in_memory(name: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model(445, tie_word_embeddings=tied).to(dtype)
    saved = save(tmp_path, model, lambda base: add_lora(base, {"r": 4, "lora_alpha": 8, **ADAPTERS[name]}))
    target = tmp_path / "merged"
    assert merge_adapter(ModelSource("base", saved.base), saved.adapter, target, max_shard_bytes=SHARD)
    merged = reload(target)
    check_same(merged, merged_in_memory(saved))
    assert merged.dtype == dtype
    assert is_tied(merged) == (tied and name not in DIFFERING)
    if dtype == torch.float32:
        torch.testing.assert_close(logits(merged), saved.logits, rtol=0, atol=ATOL)
    sizes = [path.stat().st_size for path in target.glob("model-*.safetensors")]
    largest = max(p.nbytes for p in merged.parameters())
    assert len(sizes) > 1
    assert max(sizes) < max(SHARD, largest) + 5000  # the header
    assert json.loads((target / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == sum(
        tensor.nbytes for path in target.glob("model-*.safetensors") for tensor in load_file(path).values()
    )


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1}
SMALL |= {"eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MOE = {**SMALL, "num_local_experts": 4}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}

# architecture → its config, fields of PEFT's LoraConfig, and whether its files hold what the adapter changes
OTHERS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "Conv1D": (transformers.GPT2Config(**GPT2), {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, True),
    "Conv1D, DoRA, all biases": (
        transformers.GPT2Config(**GPT2),
        {"target_modules": ["c_attn", "wte"], "use_dora": True, "bias": "all"},
        True,
    ),
    "biases of LoRA": (
        transformers.PhiConfig(**SMALL),
        {"target_modules": ["q_proj", "lm_head"], "bias": "lora_only", "lora_bias": True},
        True,
    ),
    "attention of a mixture of experts": (transformers.MixtralConfig(**MOE), {"target_modules": ["q_proj"]}, True),
    "experts that are fused on loading": (transformers.MixtralConfig(**MOE), EXPERTS, False),
    "experts that are fused on disk": (transformers.GptOssConfig(**MOE, head_dim=8), EXPERTS, True),
    "scaled embeddings": (
        transformers.Gemma3TextConfig(**SMALL, head_dim=8),
        {"target_modules": "all-linear", "trainable_token_indices": [3, 4]},
        True,
    ),
    "state space": (
        transformers.MambaConfig(vocab_size=128, hidden_size=32, state_size=4, num_hidden_layers=2),
        {"target_modules": ["x_proj", "in_proj", "embeddings"]},
        True,
    ),
}


def save_other(directory: Path, name: str) -> Saved:
    config, options, _ = OTHERS[name]
    with quiet():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        fields = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
        return save(directory, model, lambda base: peft.get_peft_model(base, peft.LoraConfig(**fields)))


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    saved = save_other(tmp_path, name)
    done_on_disk = merge_adapter(ModelSource("base", saved.base), saved.adapter, tmp_path / "merged")
    assert done_on_disk == OTHERS[name][2]
    merged = reload(tmp_path / "merged")
    check_same(merged, merged_in_memory(saved))
    torch.testing.assert_close(logits(merged), saved.logits, rtol=0, atol=ATOL)


def test_files_without_the_model_s_prefix(tmp_path: Path) -> None:
    """As GPT-2's own are: `h.0.attn.c_attn.weight`, with a mask that no parameter is."""
    saved = save_other(tmp_path, "Conv1D")
    expected = merged_in_memory(saved)
    tensors: dict[str, torch.Tensor] = {}
    for path in saved.base.glob("*.safetensors"):
        tensors |= {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
        path.unlink()
    (saved.base / "model.safetensors.index.json").unlink()
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    save_file(tensors, saved.base / "model.safetensors", metadata={"format": "pt"})
    assert merge_adapter(ModelSource("base", saved.base), saved.adapter, tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
    with quiet():
        check_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), expected)


# --- what is written --------------------------------------------------------------------------------------------------

LOAD_PLAINLY = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
from safetensors.torch import save_file
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(20, 60).view(2, 20)).logits.contiguous()}, sys.argv[2])
print(json.dumps([type(model).__name__, model.config.tie_word_embeddings]))
"""


def test_plain_transformers_loads_the_result(tmp_path: Path) -> None:
    """In a fresh process, where llmforge cannot be imported."""
    model = build_model(445, tie_word_embeddings=True)
    saved = save(tmp_path, model, lambda base: add_lora(base, {"r": 4, **ADAPTERS["input embedding"]}))
    merge_adapter(ModelSource("base", saved.base), saved.adapter, tmp_path / "merged", max_shard_bytes=SHARD)
    kind = plain_python(LOAD_PLAINLY, tmp_path / "merged", tmp_path / "logits")
    assert kind == ["LlamaForCausalLM", False]
    torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], saved.logits, rtol=0, atol=ATOL)


def test_the_base_s_other_files_and_another_number_format(tmp_path: Path) -> None:
    saved = save(tmp_path, build_model(445), lambda base: add_lora(base, {"r": 4, **ADAPTERS["lora"]}))
    (saved.base / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (saved.base / "modeling_own.py").write_text("pass\n")
    (saved.base / "tokenizer.json").write_text("{}")
    target = tmp_path / "merged"
    assert merge_adapter(ModelSource("base", saved.base), saved.adapter, target, dtype=torch.bfloat16)
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_own.py",
    ]
    assert json.loads((target / "generation_config.json").read_text()) == {"max_new_tokens": 7}
    merged = reload(target)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    check_same(merged, merged_in_memory(saved).to(torch.bfloat16))  # merged in fp32, rounded once


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, time
from pathlib import Path
import peft, torch, transformers
from llmforge.models.adapter import merge
from llmforge.models.load import load_base_model, quiet
from llmforge.models.merge import merge_adapter
from llmforge.models.rope import add_old_rope_keys
from llmforge.models.source import ModelSource

def held():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

base, adapter, target, shard = ModelSource("base", Path(sys.argv[2])), Path(sys.argv[3]), Path(sys.argv[4]), 30_000_000
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())
before = held()
thread = threading.Thread(target=watch, daemon=True)
thread.start()
if sys.argv[1] == "on disk":
    assert merge_adapter(base, adapter, target, max_shard_bytes=shard)
else:
    with quiet():
        merged = merge(peft.PeftModel.from_pretrained(load_base_model(base, dtype="auto"), adapter))
        merged.save_pretrained(target, max_shard_size=shard)
done.set()
thread.join()
print(peak - before)
"""


def save_large(directory: Path) -> int:
    """Write a random model and adapter without ever holding them; return the bytes of the model's weights."""
    config = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory / "base")
    with torch.device("meta"), quiet():
        model = transformers.LlamaForCausalLM(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    weight_map = {}
    for number, (name, shape) in enumerate(shapes.items()):
        weight_map[name] = f"model-{number:05d}.safetensors"
        save_file({name: torch.rand(shape)}, directory / "base" / weight_map[name], metadata={"format": "pt"})
    (directory / "base" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    adapted.peft_config["default"].save_pretrained(directory / "adapter")
    state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    save_file(
        {name: torch.rand(tensor.shape) for name, tensor in state.items()},
        directory / "adapter" / "adapter_model.safetensors",
    )
    return sum(4 * shape.numel() for shape in shapes.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_it_takes_a_shard_of_memory_instead_of_the_model(tmp_path: Path) -> None:
    size = save_large(tmp_path)
    assert size > 330e6
    env = {**environment(), "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    peaks = {}
    for how in ("on disk", "in memory"):
        arguments = [how, *(str(tmp_path / part) for part in ("base", "adapter", how))]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEASURE, *arguments],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        peaks[how] = int(done.stdout.split()[-1])  # some libraries speak first
    shard, module = 30e6, 4 * 1024 * 2048
    assert peaks["on disk"] < shard + 8 * module  # PEFT keeps a few copies of the module at hand
    assert peaks["in memory"] > 0.8 * size
    names = sorted(path.name for path in (tmp_path / "on disk").glob("*.safetensors"))
    assert len(names) == len(list((tmp_path / "in memory").glob("*.safetensors"))) > 10


# --- errors -----------------------------------------------------------------------------------------------------------


def refused(base: Path, adapter: Path, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        merge_adapter(ModelSource("base", base), adapter, adapter.parent / "merged")
    assert "\n" not in str(caught.value)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, build_model(445), lambda base: add_lora(base, {"r": 4, **ADAPTERS["lora"]}))
    weights = saved.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)

    lost = sorted(tensors)[3]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights)
    refused(saved.base, saved.adapter, f"lacks 1 of the {len(tensors)} tensors .*{lost}")
    save_file({}, weights)
    refused(saved.base, saved.adapter, "holds no tensors")
    weights.write_bytes(b"nothing")
    refused(saved.base, saved.adapter, "not a whole safetensors file")
    save_file({name: tensor.repeat(1, 2) for name, tensor in tensors.items()}, weights)
    refused(saved.base, saved.adapter, "cannot be merged into base")
    save_file(tensors, weights)
    settings = json.loads((saved.adapter / "adapter_config.json").read_text())
    (saved.adapter / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["c_attn"]}))
    refused(saved.base, saved.adapter, "cannot be merged into base")


# --- servability ------------------------------------------------------------------------------------------------------

UNSERVABLE: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"whole modules \(.*lm_head"),
    "tokens": ({"trainable_token_indices": [30]}, r"rows of embeddings \(new tokens"),
    "dora": ({"use_dora": True}, "DoRA"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "adapts the embeddings"),
    "head": ({"target_modules": ["lm_head"]}, "adapts the embeddings"),
    "parameters": ({"target_parameters": ["v_proj.weight"]}, "target_parameters"),
    "bias": ({"bias": "all"}, "biases"),
    "alpha": ({"alpha_pattern": {"q_proj": 3}}, "scale differs"),
    "rank": ({"r": 520}, "rank is 520, .* largest is 512"),
}


@pytest.mark.parametrize("name", UNSERVABLE)
def test_what_adapter_servers_cannot_serve_is_named(name: str, tmp_path: Path) -> None:
    options, words = UNSERVABLE[name]
    fields = {"r": 4, "target_modules": LAYERS, **options}
    save(tmp_path, build_model(445), lambda base: peft.get_peft_model(base, peft.LoraConfig(**fields)))
    (sentence,) = servability(tmp_path / "adapter")
    assert sentence.startswith("The adapter cannot be served as it is")
    assert sentence.endswith("llmforge export --format merged")
    assert re.search(words, sentence)


def test_plain_lora_can_be_served(tmp_path: Path) -> None:
    save(
        tmp_path, build_model(445), lambda base: add_lora(base, {"r": 4, "use_rslora": True, "target_modules": LAYERS})
    )
    assert servability(tmp_path / "adapter") == []
    os.truncate(tmp_path / "adapter" / "adapter_model.safetensors", 100)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        servability(tmp_path / "adapter")


# --- RoPE in the old words --------------------------------------------------------------------------------------------

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LAYERED = {"sliding_attention": PLAIN, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
LINEAR = {"rope_type": "linear", "factor": 8.0, "type": "linear"}

ROPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "theta": (
        transformers.Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        {"rope_theta": 1e6},
    ),
    "scaled": (
        transformers.LlamaConfig(rope_parameters={**LLAMA3, "rope_theta": 5e5}),
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
    ),
    "a part of each head": (
        transformers.PhiConfig(rope_parameters={**PLAIN, "partial_rotary_factor": 0.4}),
        {"rope_theta": 1e4, "partial_rotary_factor": 0.4},
    ),
    "two kinds of layers": (
        transformers.Gemma3TextConfig(rope_parameters=LAYERED),
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
    ),
    "text beside images": (
        transformers.Gemma3Config(text_config={"rope_parameters": LAYERED}),
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
    ),
    # With rope_scaling beside it, transformers would take that for all layers.
    "what the old words cannot say": (
        transformers.Gemma4TextConfig(),
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "partial_rotary_factor": 0.25},
    ),
    "no rotation": (transformers.GPT2Config(), {}),
}


@pytest.mark.parametrize("name", ROPES)
def test_old_rope_keys_say_the_same_and_change_nothing(name: str, tmp_path: Path) -> None:
    config, expected = ROPES[name]
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"

    def text() -> dict[str, Any]:
        whole = json.loads(path.read_text())
        return whole.get("text_config", whole)

    def as_read() -> Any:
        rope = getattr(transformers.AutoConfig.from_pretrained(tmp_path).get_text_config(), "rope_parameters", {})
        for part in (rope, *(part for part in rope.values() if isinstance(part, dict))):
            part.pop("type", None)
        return rope

    old, read = text(), as_read()
    add_old_rope_keys(tmp_path)
    new = text()
    assert {key: new[key] for key in old} == old
    assert {key: new[key] for key in new.keys() - old.keys()} == expected
    assert as_read() == read
    once = path.read_bytes()
    add_old_rope_keys(tmp_path)
    assert path.read_bytes() == once
