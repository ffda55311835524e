"""The adapter alone, as PEFT's plain files, with tokenizer, chat template and prompt format."""

import shutil
from pathlib import Path

from llmforge.errors import InputError
from llmforge.export.targets.trained import Trained
from llmforge.models.merge import servability
from llmforge.models.source import check_adapter


def write(trained: Trained, directory: Path) -> list[str]:
    """Copy the adapter and all that belongs to it.

    Raises:
        InputError: the run trained whole weights, or another number format is asked for.
        ModelError: the adapter is damaged.
    """
    if not trained.is_adapter:
        raise InputError("this run trained all parameters, so there is no adapter; use --format merged")
    if trained.dtype is not None:
        raise InputError("an adapter is written as it was trained; --dtype goes with --format merged")
    check_adapter(trained.artifact, key="artifact")
    for path in sorted(trained.artifact.iterdir()):
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
    base = trained.adapter_settings()["base_model_name_or_path"]
    return [f"load it onto {base} with PeftModel.from_pretrained", *servability(trained.artifact)]
