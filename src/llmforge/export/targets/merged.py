"""A plain Hugging Face model directory: whole weights, which need neither PEFT nor llmforge."""

from pathlib import Path

from llmforge.export.proof import FILE_NAME as PROOF
from llmforge.export.targets.trained import Trained


def write(trained: Trained, directory: Path) -> list[str]:
    """Write merged weights, tokenizer with chat template, generation config, prompt format and card."""
    trained.write_merged(directory)
    notes = ["any software that loads Hugging Face models serves it: `vllm serve` or `llmforge chat` with its path"]
    if (directory / PROOF).is_file():
        notes.append("`llmforge prove` with its path compares it with what was recorded in training")
    if trained.stop_strings():
        notes.append(
            f"answers also end at {', '.join(map(repr, trained.stop_strings()))}: transformers' generate needs "
            "tokenizer=… for that, and clients of vLLM send it as `stop`"
        )
    return notes
