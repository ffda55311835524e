"""Prompt formats as RayLLM reads them: templates of Python's `str.format`, and its own rules for system messages."""

import string
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from llmforge.errors import PromptFormatError
from llmforge.prompt.encoder import own_bos
from llmforge.prompt.format import PLACEHOLDER, PromptFormat

_TEMPLATES = ("system", "user", "assistant")


class RayllmFormat(PromptFormat):
    """A format that renders what RayLLM renders.

    Where the system message goes into a user turn, RayLLM does not strip it; elsewhere, it writes the tags of one that
    is blank.
    """

    def _render_system(self, content: str) -> str:
        if not content and not self.add_system_tags_even_if_message_is_empty:
            return ""
        return self._fill(self.system, content if self.system_in_user else self._clean(content))


def rayllm_format(section: Mapping[str, Any], tokenizer: Any) -> PromptFormat:
    """Build the format of a `prompt_format` section in a config of RayLLM.

    Args:
        section: all keys but those of Jinja templates; `bos` None is what the tokenizer puts in front of plain text.

    Raises:
        PromptFormatError: `str.format` could not fill a template, or the text could not be the same.
    """
    keys = {**section, "bos": own_bos(tokenizer) if section["bos"] is None else section["bos"]}
    for role in _TEMPLATES:
        allowed = {"instruction"} | ({"system"} if role == "user" and section["system_in_user"] else set())
        keys[role] = _without_doubled_braces(role, section[role], allowed)
    try:
        return RayllmFormat(**keys)
    except ValidationError as error:
        problems = "; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors() if problem["loc"])
        raise PromptFormatError(f"prompt_format is wrong: {problems or error}") from error


def _without_doubled_braces(role: str, template: str, allowed: set[str]) -> str:
    text, placeholders = "", 0
    problem: object = None
    try:
        for literal, name, spec, conversion in string.Formatter().parse(template):
            text += literal
            if name is not None:
                text += f"{{{name}}}"
                placeholders += 1
                if name not in allowed or spec or conversion:
                    problem = f"{{{name}}} is no placeholder of it"
    except ValueError as error:
        problem = error
    if problem is not None:
        raise PromptFormatError(
            f"prompt_format.{role}: given {template!r}, which RayLLM's str.format could not fill ({problem}); "
            f"placeholders are {', '.join(f'{{{name}}}' for name in sorted(allowed))}, and any other brace is written "
            "twice: {{ and }}"
        )
    if sum(match[1] in allowed for match in PLACEHOLDER.finditer(text)) > placeholders:
        raise PromptFormatError(
            f"prompt_format.{role}: given {template!r}, where the name of a placeholder stands as plain text; llmforge "
            "cannot tell the two apart; write another text"
        )
    return text
