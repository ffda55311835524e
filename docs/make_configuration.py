"""Writes docs/configuration.md from the schema, so that the page and the program cannot disagree.

python docs/make_configuration.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmforge.config.json_schema import json_schema

PAGE = Path(__file__).parent / "configuration.md"

INTRODUCTION = """\
# Configuration

One flat YAML file describes a run. The keys are LLMForge's published names, so its configs work unchanged. Numbers may
be written `1e-4` or `37_580_963_840`. Unknown keys, wrong types and impossible combinations are errors with file, line
and the nearest valid name; see them all at once with `llmforge validate --config-only CONFIG`.

* Any key can be overridden on the command line: `--set learning_rate=2e-4 --set lora_config.r=16`; `--set key=null`
  unsets.
* `--default` chooses everything but the model and the data.
* What you leave open is *derived* from data, model or hardware. `resolved_config.yaml` in the run directory holds every
  value with its origin as a comment, and is itself a valid config.
* Relative paths are looked for beside the config file first, then in the working directory.
* `llmforge schema` prints the JSON Schema, with which editors complete and check the file.

Not in this version, and refused in plain words by `finetune` (`validate --config-only` accepts them): the tasks
`classification`, `preference_tuning` and `vision_language`, `quantization`, a `cache_dir` in a bucket, and a
`context_length` above the model's own.

This page is written by `python docs/make_configuration.py` from the schema.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Give the page as the schema has it now."""
    schema = json_schema()
    lines = [INTRODUCTION, "## Keys\n", *table(schema["properties"], schema.get("required", []))]
    for name, section in sorted(schema.get("$defs", {}).items()):
        if section.get("properties"):
            lines += [f"\n## {name}\n", section.get("description", ""), ""]
            lines += table(section["properties"], section.get("required", []))
    return "\n".join(lines) + "\n"


def table(properties: dict[str, Any], required: list[str]) -> Iterator[str]:
    yield "| key | allowed | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in properties.items():
        value = field.get("default")
        default = "required" if key in required else "–" if value is None or isinstance(value, dict) else code(value)
        meaning = field.get("description", "").replace("|", "\\|")
        yield f"| `{key}` | {allowed(field)} | {default} | {meaning} |"


def allowed(field: dict[str, Any]) -> str:
    """Put a field's type and bounds in words."""
    if "$ref" in field:
        return f"[{field['$ref'].rpartition('/')[2]}](#{field['$ref'].rpartition('/')[2].lower()})"
    for keyword in ("anyOf", "oneOf", "allOf"):
        if keyword in field:
            return " or ".join(dict.fromkeys(allowed(one) for one in field[keyword] if one.get("type") != "null"))
    if "enum" in field:
        return ", ".join(code(value) for value in field["enum"])
    if "const" in field:
        return code(field["const"])
    kind = field.get("type", "anything")
    if kind == "array":
        return f"list of {allowed(field['items'])}" if isinstance(field.get("items"), dict) else "list"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true, false",
        "string": "text",
        "object": "mapping",
    }
    bounds = [
        f"{sign} {field[name]}"
        for name, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if name in field
    ]
    return " ".join([words.get(kind, str(kind)), *bounds])


def code(value: Any) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    main()
