"""Turns a YAML file into a frozen, typed, fully resolved config with the origin of every value.

Where that is not possible it says exactly why not. Owns the public schema; imports neither torch nor transformers.
"""

from llmforge.config.capabilities import refuse_unavailable, unavailable
from llmforge.config.derive import Derived, MemoryFacts
from llmforge.config.json_schema import json_schema
from llmforge.config.load import LoadedConfig, Origin, load_config
from llmforge.config.resolved import ResolvedConfig, resolve
from llmforge.config.schema import FineTuningConfig, PromptFormatSection

__all__ = [
    "Derived",
    "FineTuningConfig",
    "LoadedConfig",
    "MemoryFacts",
    "Origin",
    "PromptFormatSection",
    "ResolvedConfig",
    "json_schema",
    "load_config",
    "refuse_unavailable",
    "resolve",
    "unavailable",
]
