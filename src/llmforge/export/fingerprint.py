"""Tells exactly whether numbers are the same that they were, without keeping them: a model's in memory, and files'.

Logits cannot tell it: divergence grows with the square of a change, and an adapter that was trained briefly changes so
little that its loss drowns in rounding.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from llmforge.models.adapter import doubled
from llmforge.models.source import ADAPTER_CONFIG

_PIECE = 1 << 24  # bytes of a file that are in memory at a time
_WHERE_THE_BASE_IS = ("base_model_name_or_path", "revision")  # its directory may move


@dataclass(frozen=True)
class Numbers:
    """What was trained, hashed: each tensor by its name, in each number format that it may be loaded in.

    `scales` are what the products of adapted modules are multiplied by; a plain model has none.
    """

    tensors: Mapping[str, Mapping[torch.dtype, str]]
    scales: Mapping[str, str]


def trained_numbers(model: Any, start: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Numbers:
    """Hash what is trained of a model.

    Args:
        start: an adapter's `starting_point`, which its file is to have too.
        dtype: of a plain model's weights in its files. An adapter's are fp32 there, but PEFT loads whole modules
            (`modules_to_save`) in the format of the base model's, which is this one.
    """
    dtypes = {torch.float32, dtype} if isinstance(model, PeftModel) else {dtype}
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            saved_name = re.sub(r"\.default\b", "", name)
            first = start.get(saved_name)
            tensor = parameter if first is None else doubled(saved_name, parameter, first)
            tensors[name] = {each: _hash(tensor, each) for each in dtypes}
    return Numbers(tensors, _scales(model))


def other_numbers(model: Any, trained: Numbers, dtype: torch.dtype) -> list[str]:
    """Name the tensors, and the modules by their scale, in which a model is not the trained one."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    others = []
    for name, hashes in trained.tensors.items():
        found = parameters.get(name)
        if found is None or _hash(found, loaded := found.dtype if found.dtype in hashes else dtype) != hashes[loaded]:
            others.append(name)
    scales = _scales(model)
    return others + [name for name in {**trained.scales, **scales} if scales.get(name) != trained.scales.get(name)]


def weight_hashes(directory: Path) -> dict[str, str]:
    """Hash the files of an artifact that decide what the model computes: weights, and the configs that they need.

    Where an adapter's base model lies is left out: it may have moved.
    """
    hashes = {}
    for path in sorted([*directory.glob("*.safetensors"), directory / "config.json", directory / ADAPTER_CONFIG]):
        if not path.is_file():
            continue
        digest = hashlib.blake2b(digest_size=16)
        if path.name == ADAPTER_CONFIG:
            digest.update(_settings(path))
        else:
            with path.open("rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
        hashes[path.name] = digest.hexdigest()
    return hashes


def _settings(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        settings = json.loads(content)
        return json.dumps([[k, v] for k, v in sorted(settings.items()) if k not in _WHERE_THE_BASE_IS]).encode()
    except (ValueError, AttributeError, RecursionError):  # damaged, so the same as nothing that was written
        return content


def _scales(model: Any) -> dict[str, str]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: f"{float(layer.scaling['default']):.9g}" for name, layer in layers.items()}  # but for rounding


def _hash(tensor: torch.Tensor, dtype: torch.dtype) -> str:
    bytes_ = tensor.detach().to(dtype).cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(bytes_.numpy().data, digest_size=16).hexdigest()
