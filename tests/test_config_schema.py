"""The schema itself: every key is documented, has an effect, and agrees with PEFT, data, prompt and JSON Schema."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmforge.config import (
    Derived,
    FineTuningConfig,
    PromptFormatSection,
    ResolvedConfig,
    json_schema,
    load_config,
    refuse_unavailable,
    resolve,
)
from llmforge.config.lora_schema import LoraConfig
from llmforge.config.old_keys import OLD_KEYS
from llmforge.config.schema import COLUMNS
from llmforge.config.words import alternatives, keys_at, schemas_at
from llmforge.config.yaml_source import read_source
from llmforge.errors import NotAvailableError

DERIVED = {
    "context_length": Derived(512, "test"),
    "num_epochs": Derived(3, "test"),
    "train_batch_size_per_device": Derived(8, "test"),
    "gradient_accumulation_steps": Derived(2, "test"),
    "dtype": Derived("fp32", "test"),
    "custom_model_tag": Derived("tag", "test"),
}
MINIMAL = {"model_id": "org/model", "train_path": "train.jsonl"}
TEMPLATES = dict.fromkeys(("system", "user", "assistant", "trailing_assistant"), "{system}{instruction}")

# What has to be there before a key can be changed, by the beginning of its dotted name.
AROUND: dict[str, dict[str, Any]] = {
    "lora_config": {"lora_config": {}},
    "initial_adapter_model_ckpt_path": {"lora_config": {}},
    "quantization": {"lora_config": {}},
    "classifier_config": {"classifier_config": {"label_tokens": ["a", "b"]}},
    "preference_tuning_config": {"preference_tuning_config": {"logprob_processor_scaling_config": {}}},
    "vision_language_config": {"vision_language_config": {}},
    "deepspeed": {"deepspeed": {"config_path": "a.json"}},
    "liger_kernel": {"liger_kernel": {"enabled": True, "kwargs": {}}},
    "torch_compile_config": {"torch_compile_config": {}},
    "logger": {"logger": {"provider": "wandb"}},
    "eval_first": {"valid_path": "valid.jsonl"},
    "fsdp_cpu_offload": {"parallel": "fsdp2"},
    "padding": {"context_length": 512},
    "lora_config.layers_to_transform": {"lora_config": {"target_modules": ["q_proj"]}},
    "generation_config.prompt_format": {"generation_config": {"prompt_format": TEMPLATES}},
    "generation_config.prompt_format.chat_template": {"generation_config": {}},
    "generation_config.prompt_format.use_hf_chat_templates": {"generation_config": {}},
}
REFUSED_SECTIONS = {
    "classifier_config",
    "preference_tuning_config",
    "vision_language_config",
    "deepspeed",
    "liger_kernel",
}
ONE_VALUE = {"lora_config.task_type"}
# Values that cannot be made from the schema alone.
CHANGED: dict[str, Any] = {
    "columns": {"messages": "conversation"},
    "classifier_config.label_tokens": ["c", "d"],
    "padding": "max_length",
    "parallel": "fsdp2",
    "lora_config.layers_to_transform": [1],
    "lora_config.inference_mode": False,
}


def key_paths() -> Iterator[tuple[str, ...]]:
    """Yield the path of every key of the config, sections and what is in them."""

    def walk(path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for key in keys_at(path):
            yield (*path, key)
            yield from walk((*path, key))

    yield from walk(())


def candidates(schemas: list[Mapping[str, Any]]) -> Iterator[Any]:
    """Yield valid values, at least two for each schema that has two."""
    for schema in schemas:
        if "enum" in schema or "const" in schema:
            yield from schema.get("enum", [schema.get("const")])
            continue
        match schema.get("type"):
            case "boolean":
                yield from (True, False)
            case "integer":
                yield from (schema.get("minimum", 0) + 1, schema.get("minimum", 0) + 2)
            case "number":
                yield from (0.25, 0.5)
            case "string" if "pattern" not in schema:
                yield from ("{system}{instruction} a", "{system}{instruction} b")
            case "array" if schema.get("items"):
                yield from ([value] for value in candidates(alternatives(schema["items"])))
            case "array":
                yield from ([1, 2], [1, 3])
            case "object" if not schema.get("properties"):
                inner = schema.get("additionalProperties")
                values = candidates(alternatives(inner)) if isinstance(inner, Mapping) and inner else (1, 2)
                yield from ({"a": value} for value in values)


def put(data: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return a deep copy of `data` with the value at `path` set."""
    copy = json.loads(json.dumps(data))
    section = copy
    for part in path[:-1]:
        section = section.setdefault(part, {})
    section[path[-1]] = value
    return copy


def run_of(data: dict[str, Any], path: Path) -> ResolvedConfig:
    """Return the resolved config; raises NotAvailableError as a run would."""
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    loaded = load_config(path)
    refuse_unavailable(loaded)
    return resolve(loaded, DERIVED)


def sections(resolved: ResolvedConfig) -> dict[str, Any]:
    """Return what the parts of a run are handed."""
    names = [field.name for field in dataclasses.fields(resolved) if field.name not in ("values", "origins")]
    return {name: getattr(resolved, name) for name in names}


def value_at(data: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


@pytest.mark.parametrize("path", [path for path in key_paths() if not keys_at(path)], ids=lambda path: ".".join(path))
def test_every_key_has_an_effect_or_is_refused(path: tuple[str, ...], tmp_path: Path) -> None:
    name = ".".join(path)
    matching = [start for start in AROUND if name == start or name.startswith(f"{start}.")]
    around = MINIMAL | (AROUND[max(matching, key=len)] if matching else {})
    default = next(
        schema["properties"][path[-1]].get("default") for schema in schemas_at(path[:-1]) if "properties" in schema
    )
    try:
        before = run_of(around, tmp_path / "before.yaml")
    except NotAvailableError:  # the whole section is refused
        assert path[0] in REFUSED_SECTIONS
        return
    current = value_at(before.values, path)
    current = default if current is None else current
    values = (
        [CHANGED[name]]
        if name in CHANGED
        else [value for value in candidates(schemas_at(path)) if value not in (current, "auto")]
    )
    if not values:
        assert name in ONE_VALUE
        return
    try:
        after = run_of(put(around, path, values[0]), tmp_path / "after.yaml")
    except NotAvailableError as refusal:
        message = str(refusal)
    else:
        message = ""
        assert sections(after) != sections(before), f"{name}: {values[0]!r} instead of {current!r} changes nothing"
    assert not message or f": {path[0]}" in message


def test_every_key_is_documented() -> None:
    for path in key_paths():
        sections_with_it = [schema for schema in schemas_at(path[:-1]) if path[-1] in schema.get("properties", {})]
        for schema in sections_with_it:
            assert len(schema["properties"][path[-1]].get("description", "")) > 8, path


def test_lora_fields_are_those_of_peft() -> None:
    import peft

    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set(LoraConfig.model_fields) == theirs


def test_lora_options_make_a_peft_config(tmp_path: Path) -> None:
    import peft

    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump(
            MINIMAL
            | {
                "lora_config": {
                    "r": 4,
                    "target_modules": ["q_proj", "lm_head"],
                    "modules_to_save": [],
                    "rank_pattern": {"q_proj": 2},
                    "trainable_token_indices": {"embed_tokens": [1, 2]},
                    "layer_replication": [[0, 2], [1, 3]],
                    "use_rslora": True,
                }
            }
        )
    )
    adapter = resolve(load_config(path), DERIVED).adapter
    assert adapter is not None
    config = peft.LoraConfig(**adapter.options)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 8, 0.0, "none")
    assert config.target_modules == {"q_proj", "lm_head"}
    assert config.trainable_token_indices == {"embed_tokens": [1, 2]}
    assert config.use_rslora is True


def test_columns_are_those_that_data_reads() -> None:
    from llmforge.data.rows import FORMATS

    assert {name: set(columns) for name, columns in COLUMNS.items()} == {
        name: {*needed, *optional} for name, (needed, optional) in FORMATS.items()
    }


def test_prompt_format_keys_are_those_of_the_prompt_room() -> None:
    from llmforge.prompt import PromptFormat

    assert set(PromptFormatSection.model_fields) == {
        *PromptFormat.model_fields,
        "use_hf_chat_templates",
        "chat_template",
    }
    for key, field in PromptFormat.model_fields.items():
        if not field.is_required():
            assert PromptFormatSection.model_fields[key].default == field.default


def test_json_schema_describes_the_file() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["model_id", "train_path"]
    properties = schema["properties"]
    assert set(properties) == set(FineTuningConfig.model_fields) | set(OLD_KEYS)
    assert all(properties[key]["deprecated"] for key in OLD_KEYS)
    assert properties["num_warmup_steps"]["default"] == 10
    assert {"type": "null"} in properties["num_warmup_steps"]["anyOf"]
    assert {"type": "integer", "minimum": 0} in properties["num_warmup_steps"]["anyOf"]
    assert {"type": "null"} not in properties["model_id"].get("anyOf", [])


def test_json_schema_agrees_with_the_loader() -> None:
    import jsonschema

    validator = jsonschema.Draft202012Validator(json_schema())
    for file in sorted((Path(__file__).parent / "configs").glob("*.yaml")):
        assert not list(validator.iter_errors(read_source(file).data)), file
    assert list(validator.iter_errors(MINIMAL | {"num_epohcs": 3}))
