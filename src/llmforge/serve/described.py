"""What `/openapi.json` says of answers and errors. Nothing is built from it; tests compare it with what is sent."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Sent(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Sent):
    """What is wrong; `param` is the field that it is about, `code` a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(_Sent):
    """An error, in OpenAI's shape."""

    error: ErrorDetail


class ModelCard(_Sent):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(_Sent):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class UsageCount(_Sent):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AlternativeToken(_Sent):
    """A token that might have come, as text and byte by byte."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(AlternativeToken):
    """A token that came."""

    top_logprobs: list[AlternativeToken]


class ChatLogprobs(_Sent):
    """The log-probabilities of a message."""

    content: list[ChosenToken]
    refusal: None


class CalledFunction(_Sent):
    """The function that a call is of; its arguments are JSON."""

    name: str
    arguments: str


class ToolCall(_Sent):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The model's message; it has `tool_calls` where it calls tools."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []


class ChatAnswer(_Sent):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class _Reply(_Sent):
    id: str
    created: int
    model: str
    system_fingerprint: None
    usage: UsageCount


class ChatCompletion(_Reply):
    """The answer to a chat request that asks for no stream."""

    object: Literal["chat.completion"]
    choices: list[ChatAnswer]


class TextLogprobs(_Sent):
    """The log-probabilities of a text; the lists go together."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextAnswer(_Sent):
    """One continuation of a text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(_Reply):
    """The answer to a request for a continuation that asks for no stream."""

    object: Literal["text_completion"]
    choices: list[TextAnswer]


class TokenizedPrompt(BaseModel):
    """The token ids of a prompt; with `token_strs` where they were asked for."""

    model_config = ConfigDict(extra="forbid")

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] = []


_RETRY = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}
_ERRORS: dict[int, tuple[str, dict[str, Any]]] = {
    400: ("The request is wrong, or asks for what the model cannot do.", {}),
    401: ("No key, or a wrong one.", {"WWW-Authenticate": {"schema": {"type": "string"}}}),
    404: ("There is no such model or path.", {}),
    405: ("Not with this method.", {"Allow": {"schema": {"type": "string"}}}),
    408: ("The body did not come.", {}),
    413: ("The body is too large.", {}),
    429: ("Too many requests wait.", _RETRY),
    500: ("The model failed.", {}),
    503: ("The server shuts down.", _RETRY),
    504: ("The answer took too long.", {}),
}
EVENTS: dict[str, Any] = {
    "description": "The answer; with `stream: true` in server-sent events, each of which is a chunk, the last [DONE].",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the errors that a route answers with, besides those of all routes."""
    described: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": text, **({"headers": headers} if headers else {})}
        for status, (text, headers) in _ERRORS.items()
        if status in (401, 405, 429, 500, 503, *statuses)
    }
    return {**described, "default": {"model": ErrorReply, "description": "Any other error."}}
