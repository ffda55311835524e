"""Formats written as plain templates, one per role. They turn messages into text and know no tokenizer.

The rules are those of RayLLM (ray-project/ray-llm, `rayllm/common/models.py`), which LLMForge shares, with `bos` from
LLMForge and `strip_whitespace` off by default, so that pass-through formats reproduce the content to the letter.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llmforge.data.conversation import REASONING_KEYS
from llmforge.errors import ConversationError
from llmforge.prompt.conversation import Message, Turn, check_messages, common_prefix_length, weight_of

PLACEHOLDER = re.compile(r"\{(instruction|system)\}")


class PromptFormat(BaseModel):
    """How each role's content becomes text.

    `{instruction}` stands for the content and, in `user` with `system_in_user`, `{system}` for the rendered system
    text. They are replaced literally: any other brace, in a template or in content, is just text.

    Raises:
        pydantic.ValidationError: a placeholder is missing, a key is unknown or has the wrong type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    system: str = Field(description="Text of the system message; contains {instruction}.")
    user: str = Field(description="Text of a user message; contains {instruction}, and {system} with system_in_user.")
    assistant: str = Field(description="Text of an assistant message, its end of turn included.")
    trailing_assistant: str = Field(description="Text after which the model answers: the generation prompt.")
    bos: str = Field(default="", description="Text written once, in front.")
    system_in_user: bool = Field(default=False, description="Write the system text inside the first user turn.")
    default_system_message: str = Field(default="", description="Used where a conversation has no system message.")
    strip_whitespace: bool = Field(default=False, description="Strip white space around every message's content.")
    add_system_tags_even_if_message_is_empty: bool = Field(
        default=False, description="Write the system template even around an empty system message."
    )

    @field_validator("system", "user", "assistant")
    @classmethod
    def _holds_instruction(cls, template: str) -> str:
        if "{instruction}" not in template:
            raise ValueError(f"must contain {{instruction}}, where the message's content goes; given {template!r}")
        return template

    @model_validator(mode="after")
    def _user_holds_system(self) -> Self:
        if self.system_in_user and "{system}" not in self.user:
            raise ValueError(
                "with system_in_user: true, user must contain {system}, where the system text goes; "
                f"given {self.user!r}"
            )
        return self

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> str:
        """Render a conversation as text, ending in `trailing_assistant` if a generation prompt is asked for.

        With `continue_final_message` the last message, of the assistant, is left open for the model to go on.

        Raises:
            ConversationError: the messages are malformed, or hold something that plain templates cannot express.
        """
        check_messages(messages, continue_final_message=continue_final_message)
        text = self.bos + "".join(rendered for _, rendered in self._render_each(messages))
        if continue_final_message:
            return self._left_open(text, messages[-1]["content"])
        return text + self.trailing_assistant if add_generation_prompt else text

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """Split a conversation into its assistant turns.

        What the model has to produce is the rendered assistant text minus its common prefix with
        `trailing_assistant`: headers are given, the end of turn is produced.
        """
        turns = []
        text = self.bos
        for message, rendered in self._render_each(messages):
            if message["role"] == "assistant":
                given = common_prefix_length(rendered, self.trailing_assistant)
                turns.append(Turn(text + rendered[:given], rendered[given:], weight_of(message)))
            text += rendered
        return turns

    def _left_open(self, text: str, content: str) -> str:
        """Take what follows the last content off a rendered text, as transformers does with the compiled template.

        That one cuts at a mark and a space behind the content. Where the space was stripped, it strips the text's end.
        """
        begin, _, end = self.assistant.rpartition("{instruction}")
        text = text.removesuffix(self._fill(self.assistant, self._clean(content)))
        text += self._fill(begin, self._clean(content)) + (content.lstrip() if self.strip_whitespace else content)
        return text.rstrip() if self.strip_whitespace and not end.startswith(" ") else text

    def _render_each(self, messages: Sequence[Message]) -> Iterator[tuple[Message, str]]:
        check_messages(messages, roles=("system", "user", "assistant"))
        for index, message in enumerate(messages):
            if key := next((key for key in ("tool_calls", *REASONING_KEYS) if message.get(key)), None):
                raise ConversationError(
                    f"message {index} has {key}, which plain templates cannot express; "
                    "use prompt_format: {use_hf_chat_templates: true}"
                )
        system_message = next((message for message in messages if message["role"] == "system"), None)
        system_text = self._render_system(
            self.default_system_message if system_message is None else system_message["content"]
        )
        if not self.system_in_user and system_text:
            yield system_message or {"role": "system", "content": self.default_system_message}, system_text
            system_text = ""
        for message in messages:
            content = self._clean(message["content"])
            if message["role"] == "user":
                yield message, self._fill(self.user, content, system_text if self.system_in_user else None)
                system_text = ""
            elif message["role"] == "assistant":
                yield message, self._fill(self.assistant, content)
        if system_text:
            raise ConversationError(
                "the system message has no user turn to go into (system_in_user is true); add a user message"
            )

    def _render_system(self, content: str) -> str:
        content = self._clean(content)
        if not content and not self.add_system_tags_even_if_message_is_empty:
            return ""
        return self._fill(self.system, content)

    def _clean(self, content: str) -> str:
        return content.strip() if self.strip_whitespace else content

    def _fill(self, template: str, content: str, system_text: str | None = None) -> str:
        """Replace the placeholders in one pass, so that a placeholder inside content stays text."""

        def value(match: re.Match[str]) -> str:
            if match[1] == "instruction":
                return content
            return match[0] if system_text is None else system_text

        return PLACEHOLDER.sub(value, template)
