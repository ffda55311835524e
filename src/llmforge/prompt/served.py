"""What a server makes of a conversation: the tokenizer of an artifact and its chat template, and nothing of ours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmforge.errors import PromptFormatError
from llmforge.prompt.chat_template import ChatTemplate
from llmforge.prompt.conversation import Message


class Served:
    """The text side of an artifact, used as transformers and vLLM use it.

    Args:
        tokenizer: as a server loads it, with its chat template. It is independent of the one that training used.

    Raises:
        PromptFormatError: there is no chat template, or it is not valid Jinja.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise PromptFormatError(
                "the tokenizer has no chat template (chat_template.jinja), so nothing can be served"
            )
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer.get_chat_template(), tokenizer, from_tokenizer=True)

    def text(
        self, messages: Sequence[Message], tools: Sequence[Mapping] | None = None, *, add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the tokenizer's chat template. Raises ConversationError if it refuses."""
        return self.template.render(messages, add_generation_prompt, tools)

    def ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping] | None = None, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Encode what `text` gives, in one piece. Raises ConversationError if the template refuses."""
        return self.encode(self.text(messages, tools, add_generation_prompt=add_generation_prompt))

    def encode(self, text: str) -> list[int]:
        """Encode rendered text as `apply_chat_template` does: as a whole, and adding no special token."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, input_ids: Sequence[int]) -> str:
        """Decode token ids to text, special tokens included."""
        return self.tokenizer.decode(input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def side_by_side(trained: Sequence[int], served: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    """Show where two sequences of ids part: some tokens before the place and behind it, each with its id and text."""
    shorter = min(len(trained), len(served))
    place = next((index for index in range(shorter) if trained[index] != served[index]), shorter)
    start = max(0, place - 3)

    def shown(ids: Sequence[int]) -> str:
        tokens = [f"{token} {decode([token])!r}" for token in ids[start : place + 4]]
        return ("… " if start else "") + " | ".join(tokens) + (" …" if len(ids) > place + 4 else " (end)")

    return f"first difference at token {place}\n    trained on: {shown(trained)}\n    served:     {shown(served)}"
