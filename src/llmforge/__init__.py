"""Fine-tune any Hugging Face LLM from one YAML file, with any prompt format, and serve exactly what you trained.

    run = llmforge.finetune("config.yaml")
    print(run.chat([{"role": "user", "content": "Hello!"}]))

Names are loaded when they are first used, so importing the package costs nothing.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmforge.config import LoadedConfig, load_config
    from llmforge.errors import LlmforgeError
    from llmforge.jobs.run import Run, load_run
    from llmforge.prompt import PromptFormat
    from llmforge.python import finetune

# huggingface_hub reads this when it is imported: without it, it also asks the hub for things that no config asked for.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["LlmforgeError", "LoadedConfig", "PromptFormat", "Run", "finetune", "load_config", "load_run"]

_HOMES = {
    "LlmforgeError": "llmforge.errors",
    "LoadedConfig": "llmforge.config",
    "PromptFormat": "llmforge.prompt",
    "Run": "llmforge.jobs.run",
    "finetune": "llmforge.python",
    "load_config": "llmforge.config",
    "load_run": "llmforge.jobs.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmforge' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
