"""The checks of one conversation. Whether a prompt format can render it is for that format to say."""

from typing import Any

from llmforge.data.rows import BadRow, shown

ROLES = ("system", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # what transformers gives a template as reasoning
OPTIONAL_KEYS = ("name", "tool_calls", "tool_call_id", *REASONING_KEYS, "weight")


def checked_messages(messages: object, *, has_tools: bool, needs_assistant: bool) -> list[dict[str, Any]]:
    """Return the messages with role, content and the optional keys that have a value.

    Null means absent throughout, since Parquet fills in every key that any message has. Raises BadRow.
    """
    if not isinstance(messages, list):
        raise BadRow(f"messages is {_kind(messages)}, expected a list of {{role, content}} objects")
    if not messages:
        raise BadRow("messages is an empty list, expected at least one user turn")
    checked = [_checked_message(message, number, has_tools) for number, message in enumerate(messages, 1)]
    roles = [message["role"] for message in checked]
    if roles.count("system") > 1:
        raise BadRow(f"{roles.count('system')} system messages, expected at most one")
    if "user" not in roles:
        raise BadRow(f"no user turn (roles: {shown(', '.join(roles))}), expected at least one")
    if needs_assistant and "assistant" not in roles:
        raise BadRow(
            f"no assistant turn (roles: {shown(', '.join(roles))}), expected at least one; `task: causal_lm` needs none"
        )
    return checked


def _checked_message(message: object, number: int, has_tools: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"message {number} is {_kind(message)}, expected an object with role and content")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.pop("role", None)
    if role not in ROLES:
        given = "has no role" if role is None else f"has role {shown(role)}"
        raise BadRow(f"message {number} {given}, expected system, user, assistant or tool")
    if role == "tool" and not has_tools:
        raise BadRow(f"message {number} has role 'tool', but the row has no tools")

    content = message.pop("content", None)
    _check_content(content, number, may_be_absent=role == "assistant" and bool(message.get("tool_calls")))

    unknown = [key for key in message if key not in OPTIONAL_KEYS]
    if unknown:
        expected = ", ".join(("role", "content", *OPTIONAL_KEYS))
        raise BadRow(f"message {number} has the unknown key {shown(unknown[0])}, expected {expected}")
    if "weight" in message:
        message["weight"] = _checked_weight(message["weight"], role, number)
    if "tool_calls" in message:
        _check_tool_calls(message["tool_calls"], role, number)
    for key in REASONING_KEYS:
        if key in message and (role != "assistant" or not isinstance(message[key], str) or not is_text(message[key])):
            raise BadRow(
                f"message {number} ({role}) has {key} {shown(message[key])}, expected text, of an assistant turn"
            )
    return {"role": role, "content": content, **message}


def _check_content(content: object, number: int, may_be_absent: bool) -> None:
    match content:
        case None:
            if not may_be_absent:
                raise BadRow(f"message {number} has no content, expected text")
        case "":
            if not may_be_absent:
                raise BadRow(
                    f"message {number} has empty content, expected text (leave the message out if it says nothing)"
                )
        case str():
            if not is_text(content):
                raise BadRow(f"message {number} holds half of a surrogate pair, which is not text: {shown(content)}")
        case list():
            if any(isinstance(part, dict) and "image" in str(part.get("type")) for part in content):
                raise BadRow(f"message {number} holds an image, expected text; images need `task: vision_language`")
            raise BadRow(f"message {number} has a list as content, expected text")
        case _:
            raise BadRow(f"message {number} has {_kind(content)} as content, expected text")


def _check_tool_calls(calls: object, role: str, number: int) -> None:
    """Check calls in OpenAI's form; the `function` around name and arguments may be left out."""
    if role != "assistant":
        raise BadRow(f"message {number} has tool_calls and role {role!r}, expected calls in assistant turns only")
    if not isinstance(calls, list):
        raise BadRow(f"message {number} has {_kind(calls)} as tool_calls, expected a list of calls")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow(
                f"message {number} has the tool call {shown(call)}, expected "
                '{"type": "function", "function": {"name": …, "arguments": …}}'
            )
        if not isinstance(function.get("arguments") or "", str | dict):
            raise BadRow(
                f"message {number} calls {shown(function['name'])} with {_kind(function['arguments'])} as arguments, "
                "expected a JSON object, or the text of one"
            )


def _checked_weight(weight: object, role: str, number: int) -> int:
    if role != "assistant":
        raise BadRow(f"message {number} has a weight and role {role!r}, expected weights on assistant turns only")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        raise BadRow(f"message {number} has weight {shown(weight)}, expected 0 or 1")
    return int(weight)


def is_text(content: str) -> bool:
    r"""Tell whether `content` can be written as UTF-8; JSON lets a lone "\ud83d" through, tokenizers do not."""
    try:
        content.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return f"the boolean {str(value).lower()}"
        case int() | float():
            return f"the number {shown(value, 20)}"
        case str():
            return f"the text {shown(value)}"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return f"a value of type {type(value).__name__}"
