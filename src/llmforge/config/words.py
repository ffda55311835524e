"""Says in plain words what a value is, what a key allows, and which name was probably meant.

Everything comes from the JSON schema of the config, so that a key is described in one place only. `model` is the kind
of file it is about; unless it is given, the config of a fine-tuning run.
"""

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from llmforge.config.schema import FineTuningConfig
from llmforge.config.section import Section
from llmforge.config.yaml_source import KeyPath

Schema = Mapping[str, Any]
_MOST_LISTED = 20


@cache
def _whole_schema(model: type[Section]) -> Schema:
    """Return pydantic's JSON schema of a config, with every section in its place instead of a reference to it."""
    schema = model.model_json_schema()
    sections = schema.pop("$defs", {})

    def in_place(value: Any) -> Any:
        if isinstance(value, list):
            return [in_place(item) for item in value]
        if not isinstance(value, dict):
            return value
        if isinstance(reference := value.get("$ref"), str):
            return in_place(sections[reference.rsplit("/", 1)[1]])
        return {key: in_place(inner) for key, inner in value.items()}

    placed: Schema = in_place(schema)
    return placed


def alternatives(schema: Schema) -> list[Schema]:
    """Return the schemas of which one must fit.

    Two are left out: null, which every key may be, and LLMForge's storage objects, which nobody should learn now.
    """
    if "anyOf" in schema:
        return [found for option in schema["anyOf"] for found in alternatives(option)]
    return [] if schema.get("type") == "null" or schema.get("title") == "RemoteStoragePath" else [schema]


def schemas_at(path: KeyPath, model: type[Section] = FineTuningConfig) -> list[Schema]:
    """Return what the schema says about the value at `path`: one schema for each kind of value it may have."""
    found = alternatives(_whole_schema(model))
    for part in path:
        inner: list[Schema] = []
        for schema in found:
            if isinstance(part, int):
                if schema.get("type") == "array":
                    items: Schema = schema.get("items") or next(iter(schema.get("prefixItems", [])), {})
                    inner += alternatives(items)
            elif part in schema.get("properties", {}):
                inner += alternatives(schema["properties"][part])
            elif isinstance(schema.get("additionalProperties"), Mapping):
                inner += alternatives(schema["additionalProperties"])
        found = inner
    return found


def keys_at(path: KeyPath, model: type[Section] = FineTuningConfig) -> list[str]:
    """Return the key names that the section at `path` has; empty where it is not a section."""
    return [key for schema in schemas_at(path, model) for key in schema.get("properties", {})]


def takes_any_key(path: KeyPath) -> bool:
    """Tell whether the value at `path` is a mapping whose keys the user chooses."""
    return any(
        schema.get("type") == "object" and not schema.get("properties") and schema.get("additionalProperties")
        for schema in schemas_at(path)
    )


def allowed(schemas: Iterable[Schema]) -> str:
    """Describe the values that fit one of `schemas`."""
    words: list[str] = []
    schemas = list(schemas)
    if any(schema.get("type") == "number" for schema in schemas):  # whole numbers are numbers
        schemas = [schema for schema in schemas if schema.get("type") != "integer"]
    for schema in schemas:
        described = _allowed_one(schema)
        if described not in words:
            words.append(described)
    return " or ".join(words) or "anything"


def _allowed_one(schema: Schema) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(shown(value) for value in schema["enum"])
    if "const" in schema:
        return shown(schema["const"])
    match schema.get("type"):
        case "boolean":
            return "true or false"
        case "integer":
            return "a whole number" + _bounds(schema)
        case "number":
            return "a number" + _bounds(schema)
        case "string" if "pattern" in schema:
            return f"a text of the form {schema['pattern'].strip('^$')}"
        case "string":
            return "a path or address" if schema.get("title") == "Path" else "a text"
        case "array" if schema.get("items"):
            least = f" (at least {schema['minItems']})" if schema.get("minItems", 0) > 1 else ""
            return f"a list, each {allowed(alternatives(schema['items']))}{least}"
        case "array":
            return f"a list of {len(schema.get('prefixItems', []))}"
        case "object" if schema.get("properties"):
            return "a section with the keys " + listed(schema["properties"])
        case "object":
            inner = schema.get("additionalProperties")
            return "a mapping" + (
                f" of names to {allowed(alternatives(inner))}" if isinstance(inner, Mapping) and inner else ""
            )
    return "anything"


def _bounds(schema: Schema) -> str:
    parts = [
        f"{word} {schema[key]:.10g}"
        for key, word in (
            ("minimum", "of at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in schema
    ]
    return " " + " and ".join(parts) if parts else ""


def shown(value: Any) -> str:
    """Write a value as YAML would have it, shortened."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case str():
            return '"' + (value if len(value) <= 60 else value[:57] + "…").replace("\n", "\\n") + '"'
        case Mapping():
            keys = ", ".join(list(value)[:4]) + (", …" if len(value) > 4 else "")
            return f"a mapping with {keys}" if value else "an empty mapping"
        case list() | tuple():
            return f"a list of {len(value)}" if value else "an empty list"
    return str(value)


def listed(names: Iterable[str]) -> str:
    """Write names as a list that a person will read: all of them, or the first few."""
    names = list(names)
    return (
        ", ".join(names)
        if len(names) <= _MOST_LISTED
        else f"{', '.join(names[:8])}, … (`llmforge schema` has all of them)"
    )


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `name` was probably meant to be, or None."""
    by_folded = {candidate.lower().replace("-", "_"): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), by_folded, n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None


@cache
def sections_with(key: str, model: type[Section] = FineTuningConfig) -> list[str]:
    """Return the dotted names of the sections that have `key`."""
    found: list[str] = []

    def walk(path: tuple[str, ...], schemas: list[Schema]) -> None:
        for schema in schemas:
            for name, inner in schema.get("properties", {}).items():
                if name == key:
                    found.append(".".join(path))
                walk((*path, name), [option for option in alternatives(inner) if option.get("properties")])

    walk((), alternatives(_whole_schema(model)))
    return found


def what_to_change(value: Any, schemas: list[Schema]) -> str:
    """Say how to turn `value` into something that fits, as precisely as can be told."""
    kinds = {schema.get("type") for schema in schemas}
    choices = [
        choice for schema in schemas for choice in schema.get("enum", [schema["const"]] if "const" in schema else [])
    ]
    if isinstance(value, str):
        name = nearest(value, [choice for choice in choices if isinstance(choice, str)])
        if name is not None:
            return f"did you mean {name}?"
        if kinds & {"integer", "number"} and _is_number(value):
            return "remove the quotes"
        if "boolean" in kinds and value.lower() in ("true", "false"):
            return "remove the quotes"
        if not value:
            return "write something, or remove the key"
        if "array" in kinds and "string" not in kinds:
            return f"write [{value}]"
    if isinstance(value, float) and "integer" in kinds and value.is_integer():
        return f"write {value:.0f}"
    if "string" in kinds and not choices and isinstance(value, bool | int | float):
        return "put quotes around it"
    if isinstance(value, bool) and choices:
        return "put quotes around it, or use one of the allowed names"
    return "change it"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
