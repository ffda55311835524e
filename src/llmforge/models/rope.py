"""Writes into config.json how positions are rotated (RoPE) in the words of software older than transformers 5."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from llmforge.atomic import write_atomically
from llmforge.models.load import UNREADABLE, quiet

_TEXT = "text_config"  # where models of text and images keep what belongs to the text


def add_old_rope_keys(directory: Path, *, trust_remote_code: bool = False) -> None:
    """Add `rope_theta`, `rope_scaling` and their like to a model's config.json, where transformers 5 leaves them out.

    It writes `rope_parameters`. transformers 4 and Ollama's converter read the old keys only, and take 10,000 for a
    theta that they do not find, without a word.

    The new keys stay, and what transformers makes of the file has to stay the same: for some architectures it prefers
    `rope_scaling`, which cannot say what `rope_parameters` does. There that key is left out.
    """
    path = directory / "config.json"
    before = path.read_text(encoding="utf-8")
    config = json.loads(before)
    found = _as_read(directory, trust_remote_code)
    if found is None:
        return
    for leave_out in ((), ("rope_scaling",)):
        changed = _with_old_keys(config, leave_out)
        if changed == config:
            continue
        write_atomically(path, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
        if _as_read(directory, trust_remote_code) == found:
            return
        write_atomically(path, before)


def old_rope_keys(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Say in the old words what `rope_parameters` says; where kinds of layers differ, of those with full attention."""
    layered = any(isinstance(value, Mapping) for value in rope.values())
    full = (rope.get("full_attention") or {}) if layered else rope
    sliding = (rope.get("sliding_attention") or {}) if layered else {}
    keys = {name: full[name] for name in ("rope_theta", "partial_rotary_factor") if name in full}
    if "rope_theta" in sliding:
        keys["rope_local_base_freq"] = sliding["rope_theta"]
    if full.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in full.items() if name not in ("rope_theta", "partial_rotary_factor")}
        keys["rope_scaling"] = {**scaling, "type": full["rope_type"]}  # older still
    return keys


def _with_old_keys(config: dict[str, Any], leave_out: tuple[str, ...]) -> dict[str, Any]:
    old = old_rope_keys(config.get("rope_parameters") or {})
    changed = {**config, **{name: old[name] for name in old if name not in config and name not in leave_out}}
    if isinstance(config.get(_TEXT), dict):
        changed[_TEXT] = _with_old_keys(config[_TEXT], leave_out)
    return changed


def _as_read(directory: Path, trust_remote_code: bool) -> Any:
    """Give what transformers reads of RoPE; None where it refuses the config."""
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        except UNREADABLE:
            return None
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    return [_without_old_type(getattr(part, "rope_parameters", None)) for part in parts]


def _without_old_type(rope: Any) -> Any:
    if not isinstance(rope, Mapping):
        return rope
    return {name: _without_old_type(value) for name, value in rope.items() if name != "type"}
