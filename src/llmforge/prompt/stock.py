"""The formats of the core models that LLMForge named, read from `stock.yaml`. Code knows no model's name."""

from functools import cache
from importlib import resources
from typing import Any

import yaml


def stock_generation_config(model_id: str) -> dict[str, Any] | None:
    """Give `prompt_format` and `stopping_sequences` of a core model, named as on the hub; None for any other model."""
    return _table().get(model_id)


@cache
def _table() -> dict[str, dict[str, Any]]:
    text = resources.files("llmforge.prompt").joinpath("stock.yaml").read_text(encoding="utf-8")
    return {model: entry["generation_config"] for entry in yaml.safe_load(text) for model in entry["models"]}
