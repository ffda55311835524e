"""The JSON Schema of the config, for editors that complete and check YAML."""

from typing import Any

from llmforge.config.old_keys import OLD_KEYS
from llmforge.config.schema import FineTuningConfig

_NULL = {"type": "null"}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a config file, with descriptions and defaults.

    It accepts what `load_config` accepts: null for every key that is not required, and LLMForge's old keys,
    marked as deprecated.
    """
    schema = FineTuningConfig.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        required = section.get("required", [])
        for key, value in section.get("properties", {}).items():
            if key not in required:
                section["properties"][key] = _or_null(value)
    for key, old in OLD_KEYS.items():
        schema["properties"][key] = _or_null(
            {**old.json_schema, "deprecated": True, "description": f"Old: {old.note}."}
        )
    schema["title"] = "llmforge config"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if _NULL in schema.get("anyOf", []):
        return schema
    around: dict[str, Any] = {
        key: schema[key] for key in ("title", "description", "default", "deprecated") if key in schema
    }
    inner = {key: value for key, value in schema.items() if key not in around}
    options = inner["anyOf"] if set(inner) == {"anyOf"} else [inner]
    return {**around, "anyOf": [*options, _NULL]}
