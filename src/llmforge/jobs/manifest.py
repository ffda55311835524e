"""Records what a run was made of: versions, and hashes of everything that shaped the result.

Takes plain mappings; computes no hash and reads no model. Nothing here names a user or a machine.
"""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmforge.atomic import write_atomically
from llmforge.errors import InputError
from llmforge.jobs.events import as_json

PACKAGES = ("llmforge", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pyarrow")
SCHEMA = 1  # counts up when a reader of an older manifest would misread a newer one


def build_manifest(
    *,
    config_hash: str,
    data: Mapping[str, Any],
    base_model: Mapping[str, Any],
    tokenizer_hash: str,
    prompt_format_hash: str,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put the hashes of a run beside the versions and the platform it ran on.

    `data` maps each split to its hash and counts, `base_model` names the model and the hash of its weights; `more`
    holds what only some runs have (adapter, device, seed). Secrets are redacted, the home directory is written `~`.
    """
    manifest = {
        "schema": SCHEMA,
        "versions": {"python": platform.python_version(), **installed_versions(PACKAGES)},
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "config": {"hash": config_hash},
        "data": data,
        "base_model": base_model,
        "tokenizer": {"hash": tokenizer_hash},
        "prompt_format": {"hash": prompt_format_hash},
        **(more or {}),
    }
    return _without_home(as_json(manifest))


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest.json`, readable and with a stable key order."""
    write_atomically(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Look up versions without importing the packages; those that are not installed are left out."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _without_home(manifest: dict[str, Any]) -> dict[str, Any]:
    home = json.dumps(os.path.expanduser("~"))[:-1]  # with the opening quote: only where a text begins with it
    return json.loads(json.dumps(manifest).replace(f"{home}/", '"~/')) if len(home) > 2 else manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a run's manifest. Raises InputError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); start the run again from its config.yaml") from error
