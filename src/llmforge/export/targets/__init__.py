"""Writes a trained model for other software to serve: one file for each target, found by its name.

Each has a function `write(trained, directory)` that fills a new directory and returns what its user has to know. The
`directory` is a temporary one: nothing written into it may name it.
"""

from importlib import import_module
from pathlib import Path

from llmforge.atomic import atomic_directory
from llmforge.errors import InputError
from llmforge.export.targets.trained import Trained

TARGETS = ("adapter", "merged", "ollama", "gguf", "vllm", "rayllm")


def write_target(name: str, trained: Trained, to: Path) -> list[str]:
    """Write one target into `to`, which appears in one step once everything is written.

    Returns:
        Sentences for the user: how it is served, and what to mind.

    Raises:
        InputError: there is no such target, the place is taken, or this model cannot be written for this target.
        RunError: a program that is needed for it failed.
    """
    if name not in TARGETS:
        raise InputError(f"given --format {name}; allowed are {', '.join(TARGETS)}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(
            f"{to} exists and is not an empty directory; nothing is overwritten. Give another place as --to"
        )
    target = import_module(f"llmforge.export.targets.{name}")
    with atomic_directory(to) as temporary:
        return target.write(trained, temporary)
