"""Requests as clients write them, with a few things changed at random places."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
_SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
_HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
_CALLED = [
    *_HELLO,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        "reasoning_content": "Hm",
    },
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
]
PATHS = CHAT, TEXT, TOKENS, VECTORS = "/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/embeddings"
_SAMPLING = {"temperature": 1, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "repetition_penalty": 1.1}
_PENALTIES = {"presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"7": 5, "300": -100}}
SEEDS: tuple[tuple[str, dict[str, Any]], ...] = (
    (CHAT, {"messages": _HELLO}),
    (CHAT, {"messages": _HELLO, **_SAMPLING, "n": 2, "stop": ["x", " y"]}),
    (CHAT, {"messages": _HELLO, **_PENALTIES, **_SAMPLING, "logprobs": True, "top_logprobs": 3}),
    (CHAT, {"messages": _HELLO, "stream": True, "stream_options": {"include_usage": True}, "temperature": 1.5}),
    (CHAT, {"messages": _HELLO, "tools": [_TOOL, _TOOL], "tool_choice": "none"}),
    (CHAT, {"messages": _HELLO, "tools": [_TOOL], "tool_choice": "required", "parallel_tool_calls": False}),
    (CHAT, {"messages": _CALLED, "tools": [_TOOL], "stream": True}),
    (CHAT, {"messages": _HELLO, "response_format": {"type": "json_object"}, "temperature": 1}),
    (
        CHAT,
        {
            "messages": _HELLO,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}},
            "logprobs": True,
        },
    ),
    (
        CHAT,
        {
            "messages": [*_HELLO, {"role": "assistant", "content": "Good"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ),
    (TEXT, {"prompt": "Once upon a time", "echo": True, "n": 2, "best_of": 2, **_SAMPLING}),
    (TEXT, {"prompt": ["One", "two"], "logprobs": 2, "stream": True, **_PENALTIES}),
    (TEXT, {"prompt": [[1, 2, 3], [4]], "echo": True, "stop": "a"}),
    (TEXT, {"prompt": [5, 6, 7], "add_special_tokens": False, "ignore_eos": True, "logprobs": 0}),
    (TOKENS, {"messages": _HELLO, "tools": [], "return_token_strs": True}),
    (TOKENS, {"prompt": "Once", "add_special_tokens": True, "return_token_strs": True}),
    (VECTORS, {"input": ["a text"]}),
)
_TEXTS = (
    "", " ", "\x00", "\ud800", "a\udfffb", "\ufeff", "\ufffd", "\u202e", "é" * 50, "👩‍👩‍👧", "<|im_end|>", "<s>",
    "</s>", "<|im_start|>user\n", "{{ 7*7 }}", "{% for", "../../etc", "a/b", "tiny", "x" * 3000, "\r\n", '"',
    "[TOOL_CALLS]", "null",
)  # fmt: skip
_NUMBERS = (
    0, 1, -1, 2, 5, 127, 128, 2**31, 2**63 - 1, 2**63, -(2**63), 10**25, 10**400, 0.0, -0.0, 5e-324, 1e-40,
    1e-300, 1e-7, 0.5, 0.999999999, 1.0, 1.5, 2.0, 100, -100, 1e38, 1e308, float("nan"), float("inf"),
    float("-inf"),
)  # fmt: skip
_SCHEMAS: tuple[Any, ...] = (
    True, False, {}, {"type": "strnig"}, {"type": []}, {"$ref": "#"}, {"$ref": "#/nowhere"},
    {"$ref": "file:///etc/passwd"}, {"enum": []}, {"const": "\ud800"},
    {"const": -(2**63)}, {"enum": [-(2**63) + 1, "a"]}, {"maximum": -(10**400)},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "^(a{1000}){1000}$"}, {"type": "string", "format": "no such"}, {"not": {}},
    {"oneOf": [{"type": "string"}, {"type": "string"}]}, {"type": "integer", "minimum": 3, "maximum": 1},
    {"type": "array", "minItems": 10**12}, {"enum": list(range(3000))},
    {"type": "object", "properties": {str(i): {"type": "string"} for i in range(100)}}, {"type": "null"},
    {"x": float("nan")},
)  # fmt: skip
_OTHERS: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [{}], [None], {"": None}, {"type": "text", "text": "x"},
    [{"type": "text", "text": "x"}], [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
    {"role": "user", "content": "x"}, [0], ["a"], [1, "a"], [{}, None], [{"type": None}, []],
)  # fmt: skip
_DEEP = "something deep"  # is written as values in values in values
_DEPTHS = (10, 150, 300, 600, 900, 950, 980)
# Right fields at a wrong place, or next to what they exclude.
_FIELDS: dict[str, Any] = {
    field: value for _, body in SEEDS for field, value in body.items() if field not in ("messages", "prompt")
} | {"tool_choice": "required", "parallel_tool_calls": False, "modalities": ["text"], "reasoning": "x", "name": "x"}


def request(numbers: random.Random) -> tuple[str, bytes]:
    """Make a request; give its path and body. Answers are short, so that many can be made."""
    path, body = copy.deepcopy(numbers.choice(SEEDS))
    if path in (CHAT, TEXT):
        body["max_tokens"] = numbers.choice([1, 4, 12])
    for _ in range(numbers.choice([0, 1, 1, 1, 2, 3])):
        _change(body, numbers)
    text = json.dumps(body).encode()
    if _DEEP.encode() in text:
        depth = numbers.choice(_DEPTHS) + numbers.randrange(20)
        opening, closing = numbers.choice([(b"[", b"]"), (b'{"items": ', b"}")])
        text = text.replace(json.dumps(_DEEP).encode(), opening * depth + b"0" + closing * depth)
    if numbers.random() < 0.05:
        place = numbers.randrange(len(text))
        text = text[:place] + numbers.randbytes(numbers.randrange(3)) + text[place + numbers.randrange(3) :]
    return path, text


def _change(body: dict[str, Any], numbers: random.Random) -> None:
    body.setdefault("model", "tiny")
    holder, key = numbers.choice(list(places(body)))
    what = numbers.randrange(10)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif what == 2:
        field = numbers.choice(list(_FIELDS))
        (holder if isinstance(holder, dict) else body)[field] = copy.deepcopy(_FIELDS[field])
    elif what == 3 and isinstance(holder, dict):
        holder[numbers.choice(_TEXTS)] = holder.pop(key)
    else:
        holder[key] = _value(holder[key], numbers)


def _value(old: Any, numbers: random.Random) -> Any:
    """Choose a value, mostly of the type that was there."""
    if numbers.random() < 0.05:
        return _DEEP
    if numbers.random() < 0.3:
        return copy.deepcopy(numbers.choice([*_TEXTS, *_NUMBERS, *_SCHEMAS, *_OTHERS]))
    if isinstance(old, str):
        text = numbers.choice(_TEXTS)
        return numbers.choice([text, old + text, text + old])
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float):
        return numbers.choice(_NUMBERS)
    return copy.deepcopy(numbers.choice(_SCHEMAS if isinstance(old, dict) else _OTHERS))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Give every place in a value, as what holds it and its key there."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])
