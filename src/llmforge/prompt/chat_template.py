"""Formats written as Jinja chat templates: the tokenizer's own, or one from the config.

A template says how a conversation looks, not which part of it the model produced. That is found by rendering prefixes
of the conversation: with a generation prompt up to an assistant turn, and without one up to its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from llmforge.errors import ConversationError, PromptFormatError
from llmforge.prompt.conversation import Message, Turn, check_messages, weight_of

PROBES = ("Probe-Alpha-1", "Probe-Beta-2", "Probe-Gamma-3", "Probe-Delta-4")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template, rendered in transformers' sandbox by the tokenizer it belongs to.

    `from_tokenizer` says whether the source is the tokenizer's own template. `stray_suffix` is text that the template
    writes after a finished assistant turn although it belongs to the next one (Llama 3's first release opens an
    assistant header whether or not a generation prompt is asked for).
    """

    source: str
    tokenizer: Any
    from_tokenizer: bool
    stray_suffix: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stray_suffix", "")
        object.__setattr__(self, "stray_suffix", self._find_stray_suffix())

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Sequence[Mapping] | None = None
    ) -> str:
        """Render a conversation as text.

        Raises:
            ConversationError: the messages are malformed, or the template refuses them.
            PromptFormatError: the template is not valid Jinja, or tries to leave the sandbox.
        """
        check_messages(messages)
        # `weight` is for the loss, not for the model to read.
        visible = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                visible,
                chat_template=self.source,
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except jinja2.TemplateSyntaxError as error:
            raise PromptFormatError(
                f"the chat template is not valid Jinja: {error.message} (line {error.lineno})"
            ) from error
        except jinja2.exceptions.SecurityError as error:
            raise PromptFormatError(f"the chat template reaches for what the sandbox forbids: {error}") from error
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ConversationError(f"the chat template refuses this conversation: {error}") from error

    def turns(self, messages: Sequence[Message], tools: Sequence[Mapping] | None = None) -> list[Turn]:
        """Split a conversation into its assistant turns by rendering its prefixes.

        Raises:
            ConversationError: the template refuses a prefix, or changes the text of an assistant turn.
            PromptFormatError: the text that the template writes for generation is not how it begins the turn.
        """
        check_messages(messages)
        turns = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            whole = self.render(messages[: index + 1], False, tools).removesuffix(self.stray_suffix)
            prompt = self.render(messages[:index], True, tools) if index else self._opening(whole)
            if not whole.startswith(prompt):
                raise self._disagreement(prompt, whole)
            completion = whole[len(prompt) :]
            if (message["content"] or "").strip() not in completion:
                raise ConversationError(
                    f"the chat template changes the assistant's text: {message['content'][:60]!r} became "
                    f"{completion[:90]!r}"
                )
            turns.append(Turn(prompt, completion, weight_of(message)))
        return turns

    def _opening(self, whole: str) -> str:
        """Give how a conversation that the assistant begins is opened: no prefix of it can be rendered."""
        question = [{"role": "user", "content": PROBES[0]}]
        try:
            header = self.stray_suffix or self.render(question, True).removeprefix(self.render(question, False))
        except ConversationError:
            return ""
        return whole[: whole.index(header) + len(header)] if header and header in whole else ""

    def _disagreement(self, prompt: str, whole: str) -> ConversationError | PromptFormatError:
        """Say that a generation prompt does not begin its turn: the format's error, unless a plain question works."""
        where = f"it asks for an answer with {prompt[-60:]!r}, but writes {whole[max(0, len(prompt) - 60) :][:90]!r}"
        question, answer = ({"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": PROBES[1]})
        try:
            works = self.render([question, answer], False).startswith(self.render([question], True))
        except ConversationError:
            works = False
        if works:
            return ConversationError(f"the chat template does not write this conversation as it continues it: {where}")
        return PromptFormatError(
            f"the chat template's generation prompt is not how it begins an assistant turn: {where}. "
            "Write the format out as generation_config.prompt_format with system, user, assistant and "
            "trailing_assistant, or give a template of your own as prompt_format.chat_template"
        )

    def _find_stray_suffix(self) -> str:
        """Find text after a finished assistant turn that is not there once the conversation goes on.

        What separates an assistant turn from the next user's content ends in the user header, which the beginning of
        the conversation shows; the rest of it is the true end of turn. Only text that also asks for an answer is stray:
        an EOS that a template writes behind the last turn alone is there to be learned.
        """
        user, assistant, next_user, next_assistant = PROBES
        conversation = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
            {"role": "user", "content": next_user},
            {"role": "assistant", "content": next_assistant},
        ]
        try:
            prompt = self.render(conversation[:1], True)
            short = self.render(conversation[:2], False)
            long = self.render(conversation, False)
        except ConversationError:
            return ""  # no such conversation can be rendered, so none can be mistaken
        if assistant not in short or assistant not in long or next_user not in long:
            return ""
        after_turn = short.rpartition(assistant)[2]
        between = long.partition(assistant)[2].partition(next_user)[0]
        if between.startswith(after_turn):
            return ""
        # Compared as tokens: `<|begin_of_text|>` and `<|eot_id|>` end in the same characters.
        opening, ending = self.tokenizer([long.partition(user)[0], between], add_special_tokens=False)["input_ids"]
        header = 0
        while header < min(len(opening), len(ending)) and opening[-header - 1] == ending[-header - 1]:
            header += 1
        end_of_turn = self.tokenizer.decode(ending[: len(ending) - header], clean_up_tokenization_spaces=False)
        if not end_of_turn or not after_turn.startswith(end_of_turn):
            return ""
        stray = after_turn[len(end_of_turn) :]
        return stray if prompt.endswith(stray) else ""
