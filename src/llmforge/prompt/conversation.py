"""What a list of messages must be before any format can render it. It knows neither formats nor tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmforge.errors import ConversationError

ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, Any]
"""`role` and `content`, and optionally `weight` (0 or 1, assistant only), `name`, `tool_calls`, `tool_call_id`, and
what an assistant thought, as `reasoning_content`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn as text: what a server would be given, and what the model then has to produce.

    `prompt` is the whole rendered text up to where generation starts (all earlier turns included), `completion` the
    text that follows it, `weight` how much its tokens count. `is_as_written` is false where the completion is not all
    of what the format writes there, or more: thinking that a chat template drops, text behind its generation mark.
    """

    prompt: str
    completion: str
    weight: float
    is_as_written: bool = True


def check_messages(
    messages: Sequence[Message], *, roles: Sequence[str] = ROLES, continue_final_message: bool = False
) -> None:
    """Check the shape of `messages`.

    Raises:
        ConversationError: not a non-empty sequence of mappings, an unknown role, content that is not text,
            half a surrogate pair, a weight other than 0 and 1, more than one system message, or a last message that
            is to be continued but is not the assistant's.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ConversationError(f"messages must be a list of {{role, content}}, not {type(messages).__name__}")
    if not messages:
        raise ConversationError("messages is empty; at least one message is needed")
    systems = 0
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConversationError(
                f"message {index} must be a mapping with role and content, not {type(message).__name__}"
            )
        role = message.get("role")
        if role not in roles:
            raise ConversationError(f"message {index} has role {role!r}; allowed: {', '.join(roles)}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ConversationError(f"message {index} ({role}) needs text as content, not {content!r:.60}")
        if content and not _is_unicode(content):
            raise ConversationError(
                f"message {index} ({role}) holds half of a surrogate pair, which is no character; "
                "was the text cut in the middle of an emoji?"
            )
        if message.get("weight") not in (None, 0, 1):
            raise ConversationError(f"message {index} has weight {message['weight']!r}; allowed: 0, 1")
        systems += role == "system"
    if systems > 1:
        raise ConversationError(f"{systems} system messages; at most one is allowed")
    if continue_final_message and (messages[-1]["role"] != "assistant" or messages[-1].get("content") is None):
        raise ConversationError(
            f"continue_final_message needs a last message of the assistant, with text to go on from; it is of role "
            f"{messages[-1]['role']!r}"
        )


def weight_of(message: Message) -> float:
    """Give how much the tokens of an assistant message count: 1 unless it says 0."""
    weight = message.get("weight")
    return 1.0 if weight is None else float(weight)


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Count the leading elements that two sequences, of characters or token ids, share."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(index for index in range(shorter) if first[index] != second[index])


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
