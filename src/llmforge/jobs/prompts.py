"""What `llmforge prompt` does: finds the prompt format of a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from llmforge.prompt.infer import Inference


def infer_prompt(model: str, *, trust_remote_code: bool = False) -> "Inference":
    """Infer the prompt format of a model: a directory (a tokenizer's files are enough), a .gguf file or a hub id.

    Raises:
        InputError: there is no such model, or its tokenizer has no chat template.
    """
    from llmforge.models.load import load_tokenizer
    from llmforge.models.source import find_model
    from llmforge.prompt.infer import infer_format

    source = find_model(model, key="MODEL", relative_to=Path.cwd(), trust_remote_code=trust_remote_code, weights=False)
    return infer_format(load_tokenizer(source, trust_remote_code=trust_remote_code))


def generation_config(inference: "Inference") -> dict[str, Any]:
    """Give the `generation_config` section that an inference amounts to."""
    from llmforge.prompt.files import format_section

    if inference.format is None:
        return {"prompt_format": {"use_hf_chat_templates": True}}
    return {
        "prompt_format": format_section(inference.format),
        "stopping_sequences": list(inference.stopping_sequences),
    }


def print_inference(model: str, inference: "Inference", config: TextIO, explanation: TextIO) -> None:
    """Print a fragment of a config to one stream, and how it was come by to another."""
    from llmforge.prompt.files import write_yaml

    if inference.format is None:
        print(f"# The chat template of {model} cannot be written as plain templates:", file=config)
        for reason in inference.reasons:
            print(f"# - {reason}", file=config)
        print(f"{model}: not as plain templates; use the tokenizer's own template", file=explanation)
        for reason in inference.reasons:
            print(f"  - {reason}", file=explanation)
    else:
        print(
            f"{model}: plain templates, proven equal to the tokenizer's own on {inference.conversations} random "
            "conversations (text and token ids, prompts and training turns)",
            file=explanation,
        )
    for remark in inference.remarks:
        print(f"  note: {remark}", file=explanation)
    explanation.flush()
    config.write(write_yaml({"generation_config": generation_config(inference)}))


def inference_as_json(model: str, inference: "Inference") -> dict[str, Any]:
    """Give an inference as plain data."""
    return {
        "model": model,
        "expressible": inference.format is not None,
        "generation_config": generation_config(inference),
        "conversations": inference.conversations,
        "reasons": list(inference.reasons),
        "remarks": list(inference.remarks),
    }
