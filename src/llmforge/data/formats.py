"""Turns a row of any `data_format` into messages: by name, never by guess. It reads no file and sees no tokenizer."""

from collections.abc import Mapping
from typing import Any

from llmforge.data.conversation import checked_messages
from llmforge.data.rows import FORMATS, BadRow, RowLayout, RowProblem, shown

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}


def in_messages_form(row: object, layout: RowLayout) -> dict[str, Any] | RowProblem:
    """Return `{"messages": [...]}`, with `tools` if the row has them, or what is wrong with the row."""
    try:
        columns = _columns(row)
        tools = _tools(columns, layout)
        messages = checked_messages(
            _messages(columns, layout), has_tools=bool(tools), needs_assistant=layout.needs_assistant
        )
    except BadRow as problem:
        return RowProblem(str(problem))
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _columns(row: object) -> dict[str, Any]:
    if isinstance(row, list):
        raise BadRow("a JSON list, expected one object a line (`jq -c '.[]'` writes a list that way)")
    if not isinstance(row, dict):
        raise BadRow(f"not an object but {shown(row)}, expected one JSON object a line")
    return {name: value for name, value in row.items() if value is not None}


def _messages(row: dict[str, Any], layout: RowLayout) -> object:
    name = {ours: layout.columns.get(ours, ours) for ours in (*FORMATS[layout.data_format][0], "system", "input")}
    own = [name[ours] for ours in FORMATS[layout.data_format][0] if name[ours] in row]
    if "messages" in row and layout.data_format != "messages":
        if own:
            raise BadRow(f"both 'messages' and {own[0]!r} (data_format: {layout.data_format}), expected one of them")
        return row["messages"]
    if not own:
        _check_no_preference(row)

    match layout.data_format:
        case "messages":
            return _column(row, name["messages"], layout)
        case "prompt_completion":
            return [
                *_system(row, name["system"]),
                {"role": "user", "content": _text(row, name["prompt"], layout)},
                {"role": "assistant", "content": _text(row, name["completion"], layout)},
            ]
        case "alpaca":
            instruction = _text(row, name["instruction"], layout)
            extra = _text(row, name["input"], layout, default="")
            return [
                *_system(row, name["system"]),
                {"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction},
                {"role": "assistant", "content": _text(row, name["output"], layout)},
            ]
        case "sharegpt":
            turns = _column(row, name["conversations"], layout)
            if not isinstance(turns, list) or not turns:
                raise BadRow(f"{name['conversations']} is {shown(turns)}, expected a list of {{from, value}} objects")
            return [*_system(row, name["system"]), *(_sharegpt_message(turn, n) for n, turn in enumerate(turns, 1))]
        case "text":
            return [{"role": "user", "content": _text(row, name["text"], layout)}]
        case _:
            raise AssertionError(layout.data_format)


def _check_no_preference(row: Mapping[str, Any]) -> None:
    match "chosen" in row, "rejected" in row:
        case True, True:
            raise BadRow("a pair of 'chosen' and 'rejected', expected messages; pairs need `task: preference_tuning`")
        case True, False:
            raise BadRow("'chosen' without 'rejected'; a preference row needs both, and `task: preference_tuning`")
        case False, True:
            raise BadRow("'rejected' without 'chosen'; a preference row needs both, and `task: preference_tuning`")


def _column(row: Mapping[str, Any], name: str, layout: RowLayout) -> Any:
    if name not in row:
        has = shown(", ".join(row), 120) if row else "none"
        raise BadRow(f"no column {name!r} (data_format: {layout.data_format}); the row's columns: {has}")
    return row[name]


def _text(row: Mapping[str, Any], name: str, layout: RowLayout, default: str | None = None) -> str:
    text = row.get(name, default) if default is not None else _column(row, name, layout)
    if not isinstance(text, str):
        raise BadRow(f"column {name!r} is {shown(text)}, expected text")
    if not text and default is None:
        raise BadRow(f"column {name!r} is empty, expected text")
    return text


def _system(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the system message of a row as a list; a blank one in a column of its own means none."""
    text = row.get(name, "")
    if not isinstance(text, str):
        raise BadRow(f"column {name!r} is {shown(text)}, expected text")
    return [{"role": "system", "content": text}] if text.strip() else []


def _sharegpt_message(turn: object, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow(f"turn {number} is {shown(turn)}, expected an object with from and value")
    turn = {key: value for key, value in turn.items() if value is not None}
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise BadRow(f"turn {number} is from {shown(speaker)}, expected one of {', '.join(SHAREGPT_ROLES)}")
    message = {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}
    return message if "weight" not in turn else {**message, "weight": turn["weight"]}


def _tools(row: Mapping[str, Any], layout: RowLayout) -> list[dict[str, Any]]:
    tools = row.get(layout.columns.get("tools", "tools"), [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"tools is {shown(tools)}, expected a list of objects")
    return tools
