"""What `vllm serve` needs: weights, chat template and a config file with every argument."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from llmforge.atomic import write_atomically
from llmforge.export.targets import adapter
from llmforge.export.targets.trained import Trained, as_yaml_comment
from llmforge.models.merge import servability
from llmforge.prompt import PromptFormat, chat_template_of

CONFIG, TEMPLATE = "vllm.yaml", "chat_template.jinja"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves memory for


def write(trained: Trained, directory: Path) -> list[str]:
    """Write base model and adapter where vLLM can serve the adapter as it is, otherwise the merged model."""
    config: dict[str, Any]
    notes = [f"in this directory: `vllm serve --config {CONFIG}`; clients ask for the model {trained.name}"]
    reasons = why_merged(trained)
    if reasons:
        model = "./model"
        trained.write_merged(directory / "model")
        config = {"model": model, "served-model-name": trained.name}
        notes += reasons
    else:
        model = "./adapter"
        (directory / "adapter").mkdir()
        adapter.write(trained, directory / "adapter")
        settings = trained.adapter_settings()
        config = {
            "model": settings["base_model_name_or_path"],
            **({"revision": settings["revision"]} if settings.get("revision") else {}),
            "tokenizer": model,
            "enable-lora": True,
            "max-lora-rank": next(rank for rank in RANKS if rank >= settings["r"]),
            "lora-modules": [f"{trained.name}={model}"],
        }
        notes.append(f"the base model {config['model']} has to be where vLLM finds it under this name")
    config |= {"generation-config": model, "chat-template": f"./{TEMPLATE}"}
    if isinstance(trained.encoder.format, PromptFormat):
        config["chat-template-content-format"] = "string"
    if trained.trust_remote_code:
        config["trust-remote-code"] = True
    if trained.generation.do_sample is False:
        notes.append("the model was configured to answer greedily; clients send temperature: 0, vLLM's default is 1")
    if trained.stop_strings():
        notes.append(
            "clients have to send "
            f"{json.dumps({'stop': trained.stop_strings()}, ensure_ascii=False)}: vLLM takes end tokens from "
            "generation_config.json, but no stop strings, neither from there nor from --override-generation-config"
        )
    write_atomically(directory / TEMPLATE, chat_template_of(trained.encoder.format))
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1_000_000)
    write_atomically(directory / CONFIG, as_yaml_comment(notes) + text)
    write_atomically(directory / "README.md", _readme(trained, config, notes))
    return notes


def why_merged(trained: Trained) -> list[str]:
    """Say why an adapter server cannot serve this model as base and adapter; nothing where it can."""
    if not trained.is_adapter:
        return ["the model holds all its weights"]
    if trained.dtype is not None:
        return [f"the weights are merged, since {trained.dtype} was asked for"]
    if trained.adapter_settings()["base_model_name_or_path"].endswith(".gguf"):
        return ["the adapter is merged, since its base model is a GGUF file"]
    return [f"the adapter is merged: {why}" for why in servability(trained.artifact)]


def command(config: dict[str, Any]) -> str:
    """Write the command line that equals a config file."""
    words = ["vllm", "serve", str(config["model"])]
    for name, value in config.items():
        if name == "model":
            continue
        words.append(f"--{name}")
        if value is not True:
            words += value if isinstance(value, list) else [str(value)]
    return shlex.join(words)


def _readme(trained: Trained, config: dict[str, Any], notes: list[str]) -> str:
    return (
        f"# {trained.name} for vLLM\n\n"
        f"Run in this directory:\n\n```bash\nvllm serve --config {CONFIG}\n```\n\n"
        f"which is the same as\n\n```bash\n{command(config)}\n```\n\n" + "".join(f"* {note}\n" for note in notes)
    )
