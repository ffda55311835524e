"""LoRA through PEFT: which modules it reaches, new and continued adapters, merging."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from llmforge.errors import ModelError
from llmforge.models.load import quiet
from llmforge.models.source import check_adapter

EMBEDDINGS = ("embed_tokens", "lm_head")


def add_lora(model: Any, options: Mapping[str, Any]) -> Any:
    """Freeze a base model and add fresh LoRA adapters to it, in fp32.

    Args:
        options: fields of PEFT's `LoraConfig`.

    Raises:
        ModelError: a target names no module, or a module that LoRA cannot adapt; lists the names there are.
    """
    fields = dict(options)
    _check_targets(model, fields.get("target_modules"), "target_modules")
    _check_targets(model, fields.get("modules_to_save") or None, "modules_to_save")
    if _is_tied(model) and _touches_embeddings(model, fields):
        # Else input and output embedding would be trained apart although they are one tensor, and a merge would add
        # both changes to it (https://github.com/huggingface/peft/issues/2777).
        fields.setdefault("ensure_weight_tying", True)
    fields["target_modules"] = _plain(fields.get("target_modules"))
    with quiet():
        try:
            return peft.get_peft_model(model, peft.LoraConfig(**fields))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ModelError(
                f"lora_config does not fit this model: {str(error).splitlines()[0]}. "
                f"Modules that LoRA can adapt here: {', '.join(adaptable_modules(model))}"
            ) from error


def continue_lora(model: Any, directory: Path) -> Any:
    """Load a LoRA adapter onto its base model, to train it further.

    Raises:
        ModelError: the directory is no adapter, is damaged, or does not fit the model.
    """
    check_adapter(directory)
    with quiet():
        try:
            return peft.PeftModel.from_pretrained(model, directory, is_trainable=True)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ModelError(
                f"initial_adapter_model_ckpt_path: the adapter in {directory} does not fit this base model: "
                f"{str(error).splitlines()[0]}"
            ) from error


def merge(model: Any) -> Any:
    """Merge a PEFT model's adapter into its base weights and return the plain model.

    Where input and output embeddings are one tensor and the adapter changes them, the output embedding gets a copy of
    its own first, so that each change is added once; they are tied again if they come out equal.
    """
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    separate = _is_tied(base) and any(_has_adapter(module) for module in (embedding, head))
    if separate:
        _weight_holder(head).weight = torch.nn.Parameter(_weight_holder(head).weight.detach().clone())
    with quiet():
        merged = model.merge_and_unload(safe_merge=True)
    if separate:
        embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
        tied = torch.equal(embedding.weight, head.weight)
        if tied:
            head.weight = embedding.weight
        merged.config.tie_word_embeddings = tied
        merged.config.get_text_config().tie_word_embeddings = tied
    return merged


def adaptable_modules(model: torch.nn.Module) -> list[str]:
    """List the last name parts of the modules that LoRA can adapt, in the model's order."""
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d)
    names = (
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    )
    return list(dict.fromkeys(names))


def _check_targets(model: torch.nn.Module, targets: str | Sequence[str] | None, key: str) -> None:
    """Check that each name, or the pattern, matches a module. PEFT passes over names that match nothing."""
    if targets is None or targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        unmatched = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        unmatched = [
            target for target in targets if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
    if unmatched:
        raise ModelError(
            f"lora_config.{key}: {', '.join(unmatched)} matches no module of this model. "
            f"Modules that LoRA can adapt here: {', '.join(adaptable_modules(model))}"
        )


def _plain(targets: Any) -> Any:
    return targets if targets is None or isinstance(targets, str) else list(targets)


def _is_tied(model: Any) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and _weight_holder(embedding).weight is _weight_holder(head).weight


def _touches_embeddings(model: Any, fields: Mapping[str, Any]) -> bool:
    tied = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = [name for name, module in model.named_modules() if module in tied]
    for key in ("target_modules", "modules_to_save"):
        targets = fields.get(key) or ()
        if targets == "all-linear":
            continue  # PEFT leaves the output head out
        for name in names:
            if isinstance(targets, str) and re.fullmatch(targets, name):
                return True
            if not isinstance(targets, str) and any(name == t or name.endswith(f".{t}") for t in targets):
                return True
    return False


def _has_adapter(module: torch.nn.Module) -> bool:
    return isinstance(module, (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.ModulesToSaveWrapper))


def _weight_holder(module: Any) -> Any:
    """Give the plain layer inside PEFT's wrappers: the one that the base model's file knows."""
    if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, peft.utils.ModulesToSaveWrapper):
        return module.original_module
    return module
