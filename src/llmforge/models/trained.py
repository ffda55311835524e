"""Loads the model that an artifact holds, with plain transformers and PEFT: what any other software would load."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from llmforge.errors import ModelError
from llmforge.models.load import load_base_model, quiet
from llmforge.models.source import ADAPTER_CONFIG, ModelSource, check_adapter, check_weights, find_model
from llmforge.models.tokens import fit_to_adapter


def is_adapter(artifact: Path) -> bool:
    """Say whether an artifact holds an adapter, whose base model lies elsewhere, or whole weights."""
    return (artifact / ADAPTER_CONFIG).is_file()


def find_base_model(
    artifact: Path, *, trust_remote_code: bool = False, allow_pickle_weights: Sequence[str] = ()
) -> ModelSource:
    """Find the base model that an adapter names.

    Raises:
        ModelError: the adapter is damaged, or its base model is missing or damaged.
    """
    check_adapter(artifact, key="artifact")
    settings = json.loads((artifact / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return find_model(
        settings["base_model_name_or_path"],
        key="base model",
        relative_to=artifact,
        revision=settings.get("revision"),
        allow_pickle_weights=allow_pickle_weights,
        trust_remote_code=trust_remote_code,
    )


def load_trained_model(
    artifact: Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    allow_pickle_weights: Sequence[str] = (),
) -> Any:
    """Load an artifact: base model and adapter, or whole weights, for use and not for training.

    Args:
        dtype: of the weights in memory; an adapter's own stay fp32.
        trust_remote_code, allow_pickle_weights: what the run's config allowed for the base model.

    Raises:
        ModelError: the artifact or its base model is missing or damaged.
    """
    if not artifact.is_dir():
        raise ModelError(f"there is no artifact at {artifact}; give a run directory or an artifact directory")
    if not is_adapter(artifact):
        check_weights(artifact, key="artifact")
        source = ModelSource(str(artifact), artifact)
        return load_base_model(source, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    base = find_base_model(artifact, trust_remote_code=trust_remote_code, allow_pickle_weights=allow_pickle_weights)
    model = load_base_model(base, dtype=dtype, trust_remote_code=trust_remote_code)
    with quiet():
        fit_to_adapter(model, artifact)
        return peft.PeftModel.from_pretrained(model, artifact).eval()
