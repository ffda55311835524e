"""The wire format: OpenAI's requests, checked field by field, and its answers. It knows neither HTTP nor engines.

A field that this server does not honour is refused by name, so that nothing is silently ignored; what OpenAI's clients
send and what changes no answer is listed in `_Request` and accepted.
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from llmforge.data.conversation import checked_messages
from llmforge.data.rows import BadRow
from llmforge.errors import ConversationError
from llmforge.serve.model import Piece
from llmforge.serve.requests import Token
from llmforge.serve.token_texts import TokenTexts
from llmforge.serve.tool_calls import ToolCallReader

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
LARGEST_SEED = 2**63 - 1

T = TypeVar("T")


class ApiError(Exception):
    """What a client is told instead of an answer: a status and OpenAI's error object.

    Args:
        param: the field of the request that it is about.
        code: a word for programs, as OpenAI has them.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character and cannot be encoded") from None
    return text


def _checked_json(value: T) -> T:
    _checked_text(json.dumps(value, ensure_ascii=False))
    return value


Text = Annotated[str, AfterValidator(_checked_text)]


class _Part(_Model):
    type: Literal["text"]
    text: str


def _join_parts(content: Any) -> Any:
    """Join the text parts of a message's content line by line, as vLLM does."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind != "text":
            raise ValueError(f"parts of type text only; this model reads no {str(kind)[:40]}")
    texts = [part.get("text") for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("every part needs text")
    return "\n".join(texts)


Content = Annotated[str | None, BeforeValidator(_join_parts, json_schema_input_type=str | list[_Part] | None)]


class ChatMessage(_Model):
    """A message. `developer` is read as `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: Text | None = None
    tool_calls: Annotated[list[dict[str, Any]], AfterValidator(_checked_json)] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    thinking: Text | None = None
    # What clients send back of an answer, and what rows of training have: no part of a prompt.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    weight: Literal[0, 1] | None = None

    def as_message(self) -> dict[str, Any]:
        """Give the message as rows of training have it."""
        ignored = {"refusal", "audio", "function_call", "annotations", "weight"}
        message = self.model_dump(exclude_none=True, exclude=ignored)
        for call in message.get("tool_calls", ()):
            call.pop("index", None)  # clients send back the pieces of a stream
        if message["role"] == "developer":
            message["role"] = "system"
        return message


class _ToolFunction(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)  # the template may write more than is looked at here

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A function that the model may ask to be called; `given` is it as it was sent, for the template to write."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"] = "function"
    function: _ToolFunction
    _given: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, given: Any, check: Any) -> Self:
        tool = check(given)
        if isinstance(given, dict):
            _checked_json(given)
        tool._given = given
        return tool

    @property
    def given(self) -> dict[str, Any]:
        """Give the tool key by key as the client wrote it: templates write tools as JSON, in this order."""
        return self._given


class _NamedFunction(_Model):
    name: str


class _NamedTool(_Model):
    type: Literal["function"]
    function: _NamedFunction


class _StreamOptions(_Model):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # pads chunks against listeners; there is nothing to pad here


class _JsonSchema(_Model):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class _PlainFormat(_Model):
    type: Literal["text", "json_object"]


class _JsonSchemaFormat(_Model):
    type: Literal["json_schema"]
    json_schema: _JsonSchema


ResponseFormat = Annotated[_PlainFormat | _JsonSchemaFormat, Field(discriminator="type")]


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Stop = Annotated[
    list[Annotated[str, Field(min_length=1), AfterValidator(_checked_text)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Request(_Model):
    """What both kinds of completion have.

    Raises:
        pydantic.ValidationError: a field that is unknown, or a value out of its range.
    """

    model: str | None = Field(default=None, description="A name of /v1/models; may be left out where there is one.")
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, description="0 and -1 choose among all tokens.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-LARGEST_SEED - 1, le=LARGEST_SEED)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: Stop | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias] | None = None
    ignore_eos: bool | None = None
    # Accepted, and without influence on the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options goes with stream: true only")
        return self

    @property
    def includes_usage(self) -> bool:
        """Say whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def given(self, vocabulary: int) -> dict[str, Any]:
        """Give what is asked of the sampling, under the names of `Sampling`; what is absent is left to the model.

        Args:
            vocabulary: number of tokens that the model knows.

        Raises:
            ApiError: logit_bias names a token that there is not.
        """
        names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        if self.logit_bias:
            given["logit_bias"] = {int(token): value for token, value in self.logit_bias.items()}
            check_token_ids(given["logit_bias"], vocabulary, "logit_bias")
        if self.ignore_eos:
            given["ignore_stops"] = True
        return given


class ChatRequest(_Request):
    """`/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true only")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        _check_continuation(self.add_generation_prompt, self.continue_final_message)
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice goes with tools only")
        if isinstance(self.tool_choice, _NamedTool) and self.tool_choice.function.name not in self.tool_names:
            raise ValueError(
                f"tool_choice names {self.tool_choice.function.name!r:.80}, which is not among tools: "
                f"{', '.join(self.tool_names)}"
            )
        if self.must_call and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("response_format asks for an answer and tool_choice for a call instead; give one of them")
        return self

    @property
    def tool_names(self) -> list[str]:
        """Name the functions that may be called."""
        return [tool.function.name for tool in self.tools or ()]

    @property
    def must_call(self) -> bool:
        """Say whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, _NamedTool)

    @property
    def may_call(self) -> bool:
        """Say whether the answer may be a call."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def limit(self) -> int | None:
        """Give the most tokens that the answer may have."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Give how many alternatives of each token are asked for; None: not even the token's own log-probability."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def answer_schema(self) -> dict[str, Any] | None:
        """Give the JSON schema that the answer has to follow."""
        if self.must_call:
            return _calls_schema([tool for tool in self.tools or () if self._is_chosen(tool)])
        if isinstance(self.response_format, _JsonSchemaFormat):
            return self.response_format.json_schema.schema_
        if self.response_format is not None and self.response_format.type == "json_object":
            return {"type": "object"}
        return None

    def _is_chosen(self, tool: Tool) -> bool:
        return not isinstance(self.tool_choice, _NamedTool) or tool.function.name == self.tool_choice.function.name


def _calls_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """Give the schema of one call of one of the tools, as Llama 3.1 writes it."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "parameters": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _check_continuation(add_generation_prompt: bool | None, continue_final_message: bool | None) -> None:
    if add_generation_prompt is False and not continue_final_message:
        raise ValueError(
            "add_generation_prompt: false goes with continue_final_message: true only; the model answers at the "
            "generation prompt, as it was trained to"
        )
    if add_generation_prompt and continue_final_message:
        raise ValueError("add_generation_prompt and continue_final_message exclude each other")


class CompletionRequest(_Request):
    """`/v1/completions`."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1)
    suffix: None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must be n: all answers are given, and none is chosen")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo and logprobs exclude each other: log-probabilities of a prompt are not computed")
        if not self.prompts or not all(self.prompts):
            raise ValueError("prompt is empty; a model needs something to go on from")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"{len(self.prompts)} prompts of {self.n or 1} answers; at most {MAX_CHOICES} in all")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Give the prompts one by one, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [token for token in self.prompt if isinstance(token, int)]
        return [ids] if ids else [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class TokenizeRequest(_Model):
    """`/tokenize`: either a `prompt`, as completions have it, or `messages`, as chat completions have them."""

    model: str | None = None
    prompt: Text | None = None
    add_special_tokens: bool = True
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        _check_continuation(self.add_generation_prompt, self.continue_final_message)
        return self


class EmbeddingsRequest(_Model):
    """`/v1/embeddings`."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = None


def read_messages(
    given: Sequence[ChatMessage], tools: Sequence[Tool] | None, continue_final_message: bool | None
) -> list[dict[str, Any]]:
    """Give a conversation to be answered as a row of training would hold it.

    Raises:
        ConversationError: training would have refused it, or nothing is asked: the assistant has the last word.
    """
    try:
        messages = checked_messages(
            [message.as_message() for message in given], has_tools=bool(tools), needs_assistant=False
        )
    except BadRow as problem:
        raise ConversationError(str(problem)) from problem
    if messages[-1]["role"] == "assistant" and not continue_final_message:
        raise ConversationError(
            "the last message is the assistant's, so there is nothing to answer; leave it out, or have it continued "
            "with continue_final_message: true"
        )
    return messages


def check_token_ids(ids: Iterable[int], vocabulary: int, param: str) -> None:
    """Check that all ids are tokens. Raises ApiError."""
    if (wrong := next((token for token in ids if not 0 <= token < vocabulary), None)) is not None:
        raise ApiError(400, f"{param}: {wrong} is no token; ids go from 0 to {vocabulary - 1:,}", param=param)


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: those of its prompts, each counted once, and those of all answers, stop tokens included."""

    prompt_tokens: int
    completion_tokens: int

    def as_json(self) -> dict[str, int]:
        """Give the usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Reply:
    """What all parts of the answer to one request share: whole, or chunk by chunk."""

    def __init__(self, kind: Literal["chat.completion", "text_completion"], model: str) -> None:
        self._kind = kind
        self._chunk_kind = "chat.completion.chunk" if kind == "chat.completion" else kind
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        self._shared = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Usage) -> dict[str, Any]:
        """Give the object of an answer that is not streamed."""
        return {**self._shared, "object": self._kind, "system_fingerprint": None, "choices": choices} | {
            "usage": usage.as_json()
        }

    def chunk(self, choices: Sequence[Mapping[str, Any]], **usage: Any) -> dict[str, Any]:
        """Give the object of a chunk; with `usage` where the client asked for it."""
        return {**self._shared, "object": self._chunk_kind, "system_fingerprint": None, "choices": choices, **usage}


class Choice(Protocol):
    """One of the answers to a request, read piece by piece."""

    def open(self) -> dict[str, Any]:
        """Give what is told before the first piece."""

    def read(self, piece: Piece) -> list[dict[str, Any]]:
        """Take a piece; give the choices of the chunks that tell of it."""

    def whole(self) -> dict[str, Any]:
        """Give the choice as it stands after its last piece."""


class ChatChoice:
    """A choice of a chat completion.

    Args:
        calls: finds calls of tools in the text; None leaves the text as it is.
        texts: of the tokens, where log-probabilities are asked for.
    """

    def __init__(self, index: int, calls: ToolCallReader | None, texts: TokenTexts | None) -> None:
        self._index = index
        self._reader = calls
        self._texts = texts
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._finish: str | None = None

    def open(self) -> dict[str, Any]:
        """Give the delta with the role."""
        return self._delta({"role": "assistant", "content": ""})

    def read(self, piece: Piece) -> list[dict[str, Any]]:
        """Take a piece; give its deltas: text, then calls, then the end."""
        text = piece.text
        calls: list[dict[str, Any]] = []
        if self._reader is not None:
            text = self._reader.push(text)
            if piece.finish is not None:
                rest, calls = self._reader.finish()
                text += rest
        logprobs = [] if self._texts is None else [self._logprob(token) for token in piece.tokens]
        self._content.append(text)
        self._logprobs += logprobs
        self._calls += [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call} for call in calls]
        deltas = [self._delta({"content": text}, logprobs)] if text or logprobs else []
        if self._calls:
            numbered = [{"index": index, **call} for index, call in enumerate(self._calls)]
            deltas.append(self._delta({"tool_calls": numbered}))
        if piece.finish is not None:
            self._finish = "tool_calls" if self._calls and piece.finish == "stop" else piece.finish
            deltas.append(self._delta({}))
        return deltas

    def whole(self) -> dict[str, Any]:
        """Give the choice with its message."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message |= {"content": content.strip() or None, "tool_calls": self._calls}
        return {
            "index": self._index,
            "message": message,
            "logprobs": None if self._texts is None else {"content": self._logprobs, "refusal": None},
            "finish_reason": self._finish,
        }

    def _delta(self, delta: dict[str, Any], logprobs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": self._finish,
        }

    def _logprob(self, token: Token) -> dict[str, Any]:
        return {**self._told(token.id, token.logprob), "top_logprobs": [self._told(*other) for other in token.top]}

    def _told(self, token: int, logprob: float | None) -> dict[str, Any]:
        assert self._texts is not None
        spelled = self._texts.bytes(token)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": _finite(logprob),
            "bytes": list(spelled),
        }


class TextChoice:
    """A choice of a plain completion; `prompt` is the text to repeat in front of it."""

    def __init__(self, index: int, prompt: str, texts: TokenTexts | None) -> None:
        self._index = index
        self._prompt = prompt
        self._texts = texts
        self._pieces: list[str] = []
        self._offset = 0
        self._logprobs: dict[str, list[Any]] = {name: [] for name in _TEXT_LOGPROBS}
        self._finish: str | None = None

    def open(self) -> dict[str, Any]:
        """Give the prompt, or nothing."""
        self._pieces.append(self._prompt)
        return self._chunk(self._prompt)

    def read(self, piece: Piece) -> list[dict[str, Any]]:
        """Take a piece; give its text, and the end."""
        self._pieces.append(piece.text)
        logprobs = self._told(piece.tokens)
        for name, values in logprobs.items():
            self._logprobs[name] += values
        chunks = [self._chunk(piece.text, logprobs)] if piece.text or logprobs else []
        if piece.finish is not None:
            self._finish = piece.finish
            chunks.append(self._chunk(""))
        return chunks

    def whole(self) -> dict[str, Any]:
        """Give the choice with its text."""
        return self._chunk("".join(self._pieces), {} if self._texts is None else self._logprobs)

    def _chunk(self, text: str, logprobs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs or None, "finish_reason": self._finish}

    def _told(self, tokens: Sequence[Token]) -> dict[str, list[Any]]:
        if self._texts is None or not tokens:
            return {}
        texts = [self._texts.bytes(token.id).decode("utf-8", "replace") for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {self._texts.bytes(other).decode("utf-8", "replace"): _finite(logprob) for other, logprob in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }


_TEXT_LOGPROBS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def _finite(logprob: float | None) -> float | None:
    """Give a log-probability as JSON can hold it; OpenAI writes -9999 for what is all but impossible."""
    return logprob if logprob is None else max(logprob, -9999.0)
