"""What a config file says of a model's prompts and answers, over what the model itself says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llmforge.config.serve_config import ServedConfig
from llmforge.config.serve_schema import GenerateKwargs, RayGenerationSection
from llmforge.errors import ConfigError, ConversationError
from llmforge.models.source import ModelSource
from llmforge.prompt import Encoder, Format, Message, PromptFormat, StopRules, build_format, chat_template_of
from llmforge.prompt.rayllm import rayllm_format


class NoFormat(PromptFormat):
    """Stands for the format of a model that has none: texts can be continued, and conversations are refused."""

    system: str = "{instruction}"
    user: str = "{instruction}"
    assistant: str = "{instruction}"
    trailing_assistant: str = ""

    def _render_each(self, messages: Sequence[Message]) -> Iterator[tuple[Message, str]]:
        raise ConversationError(
            "this model has no chat template, so that it can continue texts only (/v1/completions); to chat with it, "
            "write its prompt_format in a file for llmforge serve --config"
        )


@dataclass(frozen=True)
class Overrides:
    """What is said; None is what the model has.

    Args:
        tokenizer: where tokenizer, format and stop rules are read instead of beside the weights.
        format: builds the prompt format over a tokenizer.
        sequences, token_ids: end an answer, besides what follows from tokenizer and format.
        defaults: fields of `generation_config.json`.
    """

    tokenizer: ModelSource | None = None
    format: Callable[[Any], Format] | None = None
    sequences: tuple[str, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ServedConfig, tokenizer: ModelSource | None) -> "Overrides":
        """Take them from a config file.

        Raises:
            ConfigError: it asks for something that cannot be served; says where.
        """
        sequences, token_ids = _stops(config.generation, config.file)
        return cls(tokenizer, _format(config), sequences, token_ids, _defaults(config.generation.generate_kwargs))

    def apply(self, encoder: Encoder, stop: StopRules) -> tuple[Encoder, StopRules]:
        """Put what is said over a model's own prompt format and stop rules.

        A format that spells out the model's own is the model's own: RayLLM writes blank system messages otherwise than
        training does, and what was trained counts.

        Raises:
            PromptFormatError: the format cannot be built over this tokenizer.
        """
        if self.format is not None:
            format = self.format(encoder.tokenizer)
            has_format = not isinstance(encoder.format, NoFormat)
            if not has_format or chat_template_of(format) != chat_template_of(encoder.format):
                encoder = Encoder(encoder.tokenizer, format)
        elif self.sequences is None and self.token_ids is None:
            return encoder, stop
        sequences = stop.sequences if self.sequences is None else self.sequences
        return encoder, StopRules.derive(encoder, sequences, [*stop.token_ids, *(self.token_ids or ())])


UNCHANGED = Overrides()


def _format(config: ServedConfig) -> Callable[[Any], Format] | None:
    section = config.generation.prompt_format
    if section is None and config.chat_template is None:
        return None
    if section is None:
        return partial(build_format, {"chat_template": _read_template(config)})
    if section.use_hf_chat_templates or section.chat_template:
        keys = section.model_dump(include={"use_hf_chat_templates", "chat_template"}, exclude_none=True)
        return partial(build_format, keys)
    unread = {"use_hf_chat_templates", "chat_template", "system_in_last_user"}
    return partial(rayllm_format, section.model_dump(exclude=unread))


def _read_template(config: ServedConfig) -> str:
    """Give the chat template of `engine_kwargs`, which is Jinja, or names a file of it."""
    template = config.chat_template or ""
    if "{" in template:
        return template
    try:
        return (config.file.parent / template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"engine_kwargs.chat_template: given {template}, which is no Jinja template, and no file that can be read "
            f"({error}); give either",
            file=str(config.file),
        ) from error


def _stops(generation: RayGenerationSection, file: Path) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
    """Sort stop rules into texts and token ids; RayLLM takes every number for an id, in quotes or not."""
    given, token_ids = generation.stopping_sequences, list(generation.stopping_tokens or ())
    sequences: list[str] = []
    for stop in given or ():
        if isinstance(stop, tuple) and len(stop) != 1:
            raise ConfigError(
                f"stopping_sequences: given the token ids {list(stop)}; allowed are texts and single ids; write a text",
                file=str(file),
            )
        try:
            token_ids.append(int(stop[0] if isinstance(stop, tuple) else stop))
        except ValueError:
            sequences.append(str(stop))
    are_said = given is not None or generation.stopping_tokens is not None
    return None if given is None else tuple(sequences), tuple(token_ids) if are_said else None


def _defaults(options: GenerateKwargs) -> dict[str, Any]:
    """Write sampling options as `generation_config.json` has them; vLLM draws unless the temperature is 0."""
    said = options.model_dump(exclude_none=True, exclude={"return_token_type_ids"})
    if "max_tokens" in said:
        said["max_new_tokens"] = said.pop("max_tokens")
    if said.get("top_k") == -1:
        said["top_k"] = 0
    if "do_sample" not in said and said.keys() & {"temperature", "top_p", "top_k", "min_p"}:
        said["do_sample"] = said.get("temperature", 1.0) > 0
    return said
