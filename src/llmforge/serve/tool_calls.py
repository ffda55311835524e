"""Finds the calls of tools in an answer's text, in the few shapes that chat templates teach.

`<tool_call>{"name": …, "arguments": {…}}</tool_call>` (Qwen, Hermes), `[TOOL_CALLS][{…}, …]` (Mistral), and bare
`{"name": …, "parameters": {…}}` as the whole answer (Llama 3.1). Anything else is text.
"""

import json
from collections.abc import Collection
from typing import Any

_OPENINGS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_NOISE = (*_OPENINGS, "</tool_call>", ";", ",")


class ToolCallReader:
    """Reads an answer piece by piece; text that may turn out to be a call is held back.

    Args:
        names: the functions that there are. A bare object is a call only if it names one of them.
        limit: the most calls to give.
    """

    def __init__(self, names: Collection[str], limit: int | None = None) -> None:
        self._names = names
        self._limit = limit
        self._held = ""
        self._has_content = False
        self._is_calling = False

    def push(self, text: str) -> str:
        """Take text; give what of it is content for certain."""
        self._held += text
        if self._is_calling:
            return ""
        if not self._has_content and self._held.lstrip()[:1] in ("", "{"):
            return ""  # nothing yet, or perhaps a bare object
        place = min((at for opening in _OPENINGS if (at := self._held.find(opening)) >= 0), default=None)
        if place is not None:
            self._is_calling = True
        else:
            place = len(self._held) - _begun(self._held)
        content, self._held = self._held[:place], self._held[place:]
        self._has_content = self._has_content or bool(content)
        return content

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """Give what was held back: as calls (name, and arguments as JSON) or, if it is none, as content."""
        calls = self._read_calls()
        return ("", calls[: self._limit]) if calls else (self._held, [])

    def _read_calls(self) -> list[dict[str, Any]]:
        rest, calls = _without_noise(self._held), []
        while rest:
            try:
                value, end = json.JSONDecoder().raw_decode(rest)
            except (ValueError, RecursionError):
                return []
            for call in value if isinstance(value, list) else [value]:
                if (read := self._read_call(call)) is None:
                    return []
                calls.append(read)
            rest = _without_noise(rest[end:])
        return calls

    def _read_call(self, call: Any) -> dict[str, Any] | None:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        if not self._is_calling and call["name"] not in self._names:
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {"name": call["name"], "arguments": arguments} if isinstance(arguments, str) else None


def _begun(text: str) -> int:
    """Count the characters at the end of `text` that may begin an opening."""
    lengths = (length for opening in _OPENINGS for length in range(1, len(opening)) if text.endswith(opening[:length]))
    return max(lengths, default=0)


def _without_noise(text: str) -> str:
    """Take off what stands in front of the next call: white space, marks and separators."""
    while True:
        text = text.lstrip()
        mark = next((mark for mark in _NOISE if text.startswith(mark)), None)
        if mark is None:
            return text
        text = text.removeprefix(mark)
