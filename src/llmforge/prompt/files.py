"""Builds a format from a config's section or from the `prompt_format.yaml` of an artifact, and writes that file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llmforge.atomic import write_atomically
from llmforge.errors import PromptFormatError
from llmforge.prompt.chat_template import ChatTemplate
from llmforge.prompt.encoder import Encoder, Format, own_bos
from llmforge.prompt.format import PromptFormat
from llmforge.prompt.jinja import compile_to_jinja
from llmforge.prompt.stopping import StopRules

FILE_NAME = "prompt_format.yaml"

HOW_TO_WRITE = """\
write the format down in the config, for example
  generation_config:
    prompt_format:
      system: "<|im_start|>system\\n{instruction}<|im_end|>\\n"
      user: "<|im_start|>user\\n{instruction}<|im_end|>\\n"
      assistant: "<|im_start|>assistant\\n{instruction}<|im_end|>\\n"
      trailing_assistant: "<|im_start|>assistant\\n"
    stopping_sequences: ["<|im_end|>"]
or give a Jinja template as prompt_format: {chat_template: "…"}"""


def build_format(section: Mapping[str, Any] | None, tokenizer: Any, *, plain_text: bool = False) -> Format:
    """Build the format that a `prompt_format` section asks for; without one, the tokenizer's own chat template.

    Args:
        section: the keys of `generation_config.prompt_format` that were set, or None.
        tokenizer: a transformers tokenizer.
        plain_text: the data are plain documents, for which no chat format is needed: without section and chat template,
            text passes through as it is, ended by EOS.

    Raises:
        PromptFormatError: the section is invalid, or there is neither section nor chat template.
    """
    if section and section.get("chat_template"):
        return ChatTemplate(section["chat_template"], tokenizer, from_tokenizer=False)
    if section and not section.get("use_hf_chat_templates"):
        explicit = {key: value for key, value in section.items() if key != "use_hf_chat_templates"}
        try:
            return PromptFormat(**explicit)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in problem['loc']) or 'prompt_format'}: {problem['msg']}"
                for problem in error.errors()
            )
            raise PromptFormatError(f"prompt_format is wrong: {problems}") from error
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer.get_chat_template(), tokenizer, from_tokenizer=True)
    if plain_text:
        passed = "{instruction}"
        return PromptFormat(
            system=passed,
            user=passed,
            assistant=passed + (tokenizer.eos_token or ""),
            trailing_assistant="",
            bos=own_bos(tokenizer),
        )
    asked = "use_hf_chat_templates is true, but the" if section else "no prompt_format is given, and the"
    raise PromptFormatError(f"{asked} tokenizer of {tokenizer.name_or_path} has no chat template; {HOW_TO_WRITE}")


def chat_template_of(format: Format) -> str:
    """Give the Jinja chat template under which any server renders what this format renders."""
    return format.source if isinstance(format, ChatTemplate) else compile_to_jinja(format)


def format_section(format: Format) -> dict[str, Any]:
    """Give the `prompt_format` section that stands for a format, every value written out."""
    if isinstance(format, PromptFormat):
        return format.model_dump()
    return {"use_hf_chat_templates": True} if format.from_tokenizer else {"chat_template": format.source}


def save_format(directory: Path, format: Format, stop: StopRules) -> None:
    """Write `prompt_format.yaml` to an artifact: the keys of `generation_config`, as a config takes them."""
    content = {
        "prompt_format": format_section(format),
        "stopping_sequences": list(stop.sequences),
        "stopping_tokens": list(stop.token_ids),
    }
    write_atomically(directory / FILE_NAME, write_yaml(content))


def write_yaml(content: Mapping[str, Any]) -> str:
    """Write keys of a config as YAML, templates in double quotes and each on one line."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


def load_format(directory: Path, tokenizer: Any) -> tuple[Encoder, StopRules]:
    """Read an artifact's `prompt_format.yaml`.

    Raises:
        PromptFormatError: the file is missing or damaged.
    """
    path = directory / FILE_NAME
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        format = build_format(content["prompt_format"], tokenizer)
        stop = StopRules(sequences=tuple(content["stopping_sequences"]), token_ids=tuple(content["stopping_tokens"]))
    except FileNotFoundError as error:
        raise PromptFormatError(f"{path} is missing; is {directory} an artifact that llmforge wrote?") from error
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError, ValidationError) as error:
        raise PromptFormatError(f"{path} is damaged: {error}") from error
    return Encoder(tokenizer, format), stop


class _Dumper(yaml.SafeDumper):
    """Writes templates in double quotes, the one style of YAML that keeps every character (U+0085, for one)."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isidentifier() else '"'
    ),
)
