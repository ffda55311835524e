"""Mends models that transformers breaks, one file for each `model_type`, found by its name.

A file has `mend(model)`, which changes that one model and no class, and names the fault it is for. Each has a test that
fails once transformers does without: then the file goes.
"""

import pkgutil
from importlib import import_module
from typing import Any

_NAMES = frozenset(module.name for module in pkgutil.iter_modules(__path__))


def mend(model: Any) -> None:
    """Mend a plain model that is to be trained, if there is something to mend."""
    if model.config.model_type in _NAMES:
        import_module(f"{__name__}.{model.config.model_type}").mend(model)
