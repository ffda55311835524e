"""Resolution, its round trip through YAML, derived values, and refusals of what this version cannot do."""

import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmforge.config import (
    Derived,
    MemoryFacts,
    ResolvedConfig,
    derive,
    load_config,
    refuse_unavailable,
    resolve,
    unavailable,
)
from llmforge.config.resolved import NEEDED
from llmforge.config.yaml_source import parse_source
from llmforge.errors import NotAvailableError

MINIMAL = "model_id: org/model\ntrain_path: train.jsonl\n"
CONFIGS = Path(__file__).parent / "configs"
DERIVED = {
    "context_length": Derived(512, "the longest sample has 500 tokens"),
    "num_epochs": Derived(3, "100 / 40"),
    "train_batch_size_per_device": Derived(8, "memory"),
    "gradient_accumulation_steps": Derived(2, "16 examples"),
    "dtype": Derived("fp32", "no bf16"),
}


def resolved(path: Path, text: str, *overrides: str) -> ResolvedConfig:
    path.write_text(text, encoding="utf-8")
    return resolve(load_config(path, overrides), DERIVED)


def test_what_the_user_left_open_is_derived(tmp_path: Path) -> None:
    result = resolved(tmp_path / "c.yaml", MINIMAL)
    assert result.adapter is None
    assert result.logger is None
    assert result.task.name == "causal_lm"
    assert result.optimization.learning_rate == 1e-5
    assert result.optimization.num_epochs == 3
    assert result.optimization.num_warmup_steps == 10
    assert result.checkpoint.eval_batch_size_per_device == 16
    assert (result.data.packing, result.data.padding) == ("auto", None)  # what the model can do is not known yet
    assert result.data.workers >= 1
    assert result.data.cache_dir
    assert (result.origins["context_length"].kind, result.origins["context_length"].reason) == (
        "derived",
        "the longest sample has 500 tokens",
    )


def test_what_the_user_set_wins(tmp_path: Path) -> None:
    result = resolved(
        tmp_path / "c.yaml", MINIMAL + "context_length: 64\nlearning_rate: 3e-4\nlora_config: {}\n", "dtype=bf16"
    )
    assert result.data.context_length == 64
    assert result.optimization.learning_rate == 3e-4
    assert result.speed.dtype == "bf16"
    assert result.origins["dtype"].kind == "override"
    assert result.adapter is not None
    assert result.adapter.options["lora_alpha"] == 16


def test_task_follows_its_section(tmp_path: Path) -> None:
    result = resolved(tmp_path / "c.yaml", MINIMAL + "classifier_config: {label_tokens: [a, b]}\n")
    assert result.task.name == "classification"
    assert result.task.options is not None


def test_lora_has_its_own_learning_rate(tmp_path: Path) -> None:
    assert resolved(tmp_path / "c.yaml", MINIMAL + "lora_config: {r: 4}\n").optimization.learning_rate == 1e-4


def test_a_value_that_only_the_run_knows_must_be_given(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(MINIMAL)
    with pytest.raises(AssertionError, match="context_length"):
        resolve(load_config(tmp_path / "c.yaml"), {})


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("org/model", "org/model"),
        ("/data/models/tiny", "tiny"),
        ("./m/tiny.gguf", "tiny"),
        ("s3://b/x/tiny/", "tiny"),
    ],
)
def test_generated_tag(tmp_path: Path, model_id: str, name: str) -> None:
    tags = {resolved(tmp_path / "c.yaml", f"model_id: {model_id}\ntrain_path: a\n").output.tag for _ in range(3)}
    assert len(tags) == 3
    for tag in tags:
        start, user, letters = tag.rsplit(":", 2)
        assert start == name
        assert 1 <= len(user) <= 5
        assert len(letters) == 5
        assert set(letters) <= set(string.ascii_lowercase)


def round_trip(result: ResolvedConfig, path: Path) -> ResolvedConfig:
    path.write_text(result.to_yaml(), encoding="utf-8")
    loaded = load_config(path)
    assert loaded.notes == []
    return resolve(loaded, {})


@pytest.mark.parametrize(
    "file", [None, *sorted(CONFIGS.glob("*.yaml"))], ids=lambda file: file.stem if file else "minimal"
)
def test_resolved_config_is_a_config_and_a_fixed_point(tmp_path: Path, file: Path | None) -> None:
    text = file.read_text(encoding="utf-8") if file else MINIMAL
    first = resolved(tmp_path / "config.yaml", text)
    second = round_trip(first, tmp_path / "resolved.yaml")
    assert second.values == first.values
    for name in ("model", "adapter", "data", "task", "generation", "optimization", "speed", "devices", "checkpoint"):
        assert getattr(second, name) == getattr(first, name)
    assert (second.logger, second.output) == (first.logger, first.output)


def test_each_line_of_the_resolved_config_says_where_it_comes_from(tmp_path: Path) -> None:
    text = resolved(tmp_path / "c.yaml", MINIMAL + "lora_config:\n  r: 4\n", "seed=5").to_yaml()
    lines = text.splitlines()
    assert all("  # " in line for line in lines)
    assert "model_id: org/model  # c.yaml:1" in lines
    assert "seed: 5  # --set seed=5" in lines
    assert "context_length: 512  # derived: the longest sample has 500 tokens" in lines
    assert "  r: 4  # c.yaml:4" in lines
    assert "  lora_alpha: 8  # derived: 2 × r" in lines
    assert "  bias: none  # default" in lines
    assert "valid_path: null  # not set: no evaluation" in lines
    assert "learning_rate: 0.0001  # derived: usual for LoRA" in lines


def test_other_yaml_readers_read_the_same_values(tmp_path: Path) -> None:
    result = resolved(tmp_path / "c.yaml", MINIMAL + "learning_rate: 1e-7\nworker_resources: {a: 37_580_963_840}\n")
    assert yaml.safe_load(result.to_yaml()) == result.values


TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(template=TEXTS, options=st.dictionaries(TEXTS, JSON, max_size=4))
def test_any_text_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, template: str, options: Any
) -> None:
    path = tmp_path_factory.mktemp("round") / "c.yaml"
    templates = {"system": "", "user": template, "assistant": "\n", "trailing_assistant": template}
    templates = {key: value + "{instruction}" for key, value in templates.items()}
    data = {
        "model_id": "a",
        "train_path": "b",
        "generation_config": {"prompt_format": templates, "generate_kwargs": options},
    }
    path.write_text(yaml.safe_dump(data), encoding="utf-8", newline="")  # escapes: PyYAML loses a bare U+0085
    data["generation_config"] |= {"stopping_sequences": [], "stopping_tokens": []}
    first = ResolvedConfig.to_yaml(resolve(load_config(path), DERIVED | {"custom_model_tag": Derived("t", "t")}))
    assert parse_source(first, "r").data["generation_config"]["prompt_format"] == templates
    path.write_text(first, encoding="utf-8", newline="")
    assert resolve(load_config(path), {}).values["generation_config"]["prompt_format"] == templates


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("quantization: 4bit\nlora_config: {}", "quantization"),
        ("task: vision_language", "task"),
        ("classifier_config: {label_tokens: [a, b]}", "classifier_config"),
        ("preference_tuning_config: {}", "preference_tuning_config"),
        ("vision_language_config: {}", "vision_language_config"),
        ("cache_dir: s3://bucket/cache", "cache_dir"),
        ("lora_config: {init_lora_weights: eva}", "lora_config.init_lora_weights"),
        ("lora_config: {megatron_core: a}", "lora_config.megatron_core"),
    ],
)
def test_what_this_version_cannot_do_is_refused(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL + text + "\n")
    loaded = load_config(path)
    assert [found for found, _ in unavailable(loaded)] == [key]
    with pytest.raises(NotAvailableError) as caught:
        refuse_unavailable(loaded)
    assert str(caught.value).startswith(f"{path}:3: {key}: ")
    assert caught.value.line == 3


@pytest.mark.parametrize(
    "text",
    [
        "packing: auto\nnum_devices: 1\nparallel: auto\nquantization: none\nworker_resources: {}",
        "num_devices: 2\nparallel: fsdp2\nfsdp_cpu_offload: true\nworker_resources: {a: 1}",
        "num_devices: 2\ndeepspeed: {config_path: a}\ntrainer_resources: {memory: 1}\nliger_kernel: {enabled: true}",
        "flash_attention_2: true\ngradient_checkpointing: true\ntorch_compile_config: {}",
        "liger_kernel: {enabled: false}\nlogger: {provider: trackio}\ntask: instruction_tuning",
    ],
)
def test_what_this_version_can_do_is_not_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(MINIMAL + text + "\n")
    refuse_unavailable(load_config(tmp_path / "c.yaml"))


def test_all_refusals_come_together(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL + "quantization: 4bit\nlora_config: {megatron_core: a}\ntask: vision_language\n")
    with pytest.raises(NotAvailableError) as caught:
        refuse_unavailable(load_config(path))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["quantization", "lora_config.megatron_core", "task"]
    assert caught.value.line == 3


# --- derived values ---------------------------------------------------------------------------------------


@given(longest=st.integers(0, 200_000), native=st.none() | st.integers(1, 150_000))
def test_context_length(longest: int, native: int | None) -> None:
    value = derive.context_length(longest, native).value
    if native is None or longest <= native:
        assert value >= longest
    if value != native:
        assert value % 64 == 0
        assert value - longest < 64 or value == 64
    assert native is None or value <= native


@given(least=st.integers(1, 10_000), per_epoch=st.integers(1, 10_000))
def test_num_epochs(least: int, per_epoch: int) -> None:
    epochs = derive.num_epochs(least, per_epoch).value
    assert (epochs - 1) * per_epoch < least <= epochs * per_epoch


def facts(**changes: Any) -> MemoryFacts:
    tiny = {"hidden_size": 576, "num_layers": 30, "vocab_size": 49152, "bytes_per_value": 4, "is_lora": True}
    return MemoryFacts(
        **{**tiny, "gradient_checkpointing": False, "on_cpu": True, "available_bytes": 8 << 30, **changes}
    )


def test_batch_size_grows_with_memory_and_shrinks_with_everything_else() -> None:
    size = derive.train_batch_size(facts(), 256).value
    assert size in (1, 2, 4, 8)
    assert derive.train_batch_size(facts(available_bytes=1 << 40), 256).value == 8
    assert derive.train_batch_size(facts(available_bytes=1 << 40, on_cpu=False), 256).value == 16
    assert derive.train_batch_size(facts(available_bytes=1 << 20), 256).value == 1
    assert derive.train_batch_size(facts(), 2048).value <= size
    assert derive.train_batch_size(facts(is_lora=False), 256).value <= size
    assert derive.train_batch_size(facts(gradient_checkpointing=True), 256).value >= size
    assert derive.train_batch_size(facts(bytes_per_value=2), 256).value >= size


def test_activations_are_computed_again_only_where_memory_asks_for_it() -> None:
    assert derive.gradient_checkpointing(facts(), 2048).value is False
    assert derive.gradient_checkpointing(facts(available_bytes=2 << 30), 4096).value is True
    assert derive.tokens_that_fit(facts(is_lora=False)) < derive.tokens_that_fit(facts())
    assert derive.tokens_that_fit(facts(available_bytes=1 << 20)) < 0


@pytest.mark.parametrize(("batch", "steps"), [(1, 16), (2, 8), (8, 2), (16, 1), (64, 1)])
def test_accumulation_makes_sixteen_examples(batch: int, steps: int) -> None:
    assert derive.gradient_accumulation_steps(batch, chosen_by_user=False).value == steps
    assert derive.gradient_accumulation_steps(batch, chosen_by_user=True).value == 1


def test_places_and_numbers_of_this_machine() -> None:
    assert derive.dtype(has_bf16=True, device="this GPU") == Derived("bf16", "this GPU has bf16 arithmetic")
    assert derive.dtype(has_bf16=False, device="this CPU").value == "fp32"
    assert derive.data_workers().value >= 1
    assert derive.cache_dir({"XDG_CACHE_HOME": "/x"}, "linux").value == "/x/llmforge"
    assert derive.cache_dir({}, "darwin").value.endswith("Library/Caches/llmforge")


def test_needed_values_are_keys_of_the_config() -> None:
    from llmforge.config import FineTuningConfig

    assert set(NEEDED) <= set(FineTuningConfig.model_fields)


@pytest.mark.parametrize(
    ("gigabytes", "num_devices", "kind"), [(100, 1, "ddp"), (100, 4, "ddp"), (1, 4, "fsdp2"), (1, 1, "ddp")]
)
def test_devices_share_the_state_where_one_cannot_hold_it(gigabytes: int, num_devices: int, kind: str) -> None:
    memory = derive.MemoryFacts(
        available_bytes=gigabytes << 30,
        hidden_size=2048,
        num_layers=16,
        vocab_size=32_000,
        bytes_per_value=2,
        is_lora=False,
        gradient_checkpointing=False,
        on_cpu=False,
    )
    assert derive.parallel(memory, 1024, num_devices).value == kind
