"""Loads the model that an artifact holds, with plain transformers and PEFT: what any other software would load."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import safe_open

from llmforge.errors import ModelError
from llmforge.models.load import UNREADABLE, load_base_model, quiet, reason
from llmforge.models.source import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ModelSource,
    check_adapter,
    check_weights,
    find_model,
)
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
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str):
        raise ModelError(
            f"{artifact / ADAPTER_CONFIG} names no base model (base_model_name_or_path is {json.dumps(name)}); set it "
            "to the base model's directory or hub id"
        )
    return find_model(
        name,
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
        try:
            fit_to_adapter(model, artifact)
            adapted = peft.PeftModel.from_pretrained(model, artifact)
        except torch.OutOfMemoryError:
            raise
        except UNREADABLE as error:
            raise ModelError(f"the adapter in {artifact} cannot be loaded onto {base.name}: {reason(error)}") from error
        _check_names(adapted, artifact)
    return adapted.eval()


def _check_names(model: Any, adapter: Path) -> None:
    """Check that a loaded adapter was filled by its file: PEFT passes over what is missing, and over what it knows not.

    Raises:
        ModelError: tensors are missing from the file, or in it under names that are no part of the model.
    """
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = set(convert_peft_adapter_state_dict_for_transformers(model, model.peft_config["default"], tensors))
    # One tensor may have two names (tied embeddings), of which the file has one or both.
    filled = {state[name].data_ptr() for name in found & state.keys()}
    missing = sorted(name for name, tensor in state.items() if name not in found and tensor.data_ptr() not in filled)
    # Older PEFT saves the embeddings that it does not train, too.
    unknown = sorted(name for name in found - state.keys() - model.state_dict().keys() if ".base_layer." not in name)
    for names, what in ((missing, "lacks"), (unknown, "holds, under names that are no part of the model,")):
        if names:
            raise ModelError(
                f"the adapter in {adapter} {what} {len(names)} tensors ({names[0]}, for one), against the {len(state)} "
                "that its config asks for; save or copy it again"
            )
