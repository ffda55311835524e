"""The HTTP application: OpenAI's endpoints over the models that are served. Needs the extra `serve`."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, Response

from llmforge.data.rows import shown
from llmforge.errors import ConversationError, InputError
from llmforge.prompt import PromptFormat
from llmforge.prompt.encoder import own_bos
from llmforge.serve.described import (
    EVENTS,
    ChatCompletion,
    ErrorReply,
    ModelCard,
    ModelList,
    TextCompletion,
    TokenizedPrompt,
    errors,
)
from llmforge.serve.door import CLIENT_LEFT, Door, Settings, Traffic
from llmforge.serve.failures import install_handlers
from llmforge.serve.metrics import Metrics
from llmforge.serve.model import Answer, Piece, ServedModel
from llmforge.serve.models import Models
from llmforge.serve.openai import (
    LARGEST_SEED,
    ApiError,
    ChatChoice,
    ChatMessage,
    ChatRequest,
    Choice,
    CompletionRequest,
    EmbeddingsRequest,
    Reply,
    TextChoice,
    TokenizeRequest,
    Tool,
    Usage,
    check_token_ids,
    read_messages,
)
from llmforge.serve.requests import Sampling
from llmforge.serve.streaming import ClientLeftError, EventStream, merge, while_there
from llmforge.serve.structured import json_grammar
from llmforge.serve.token_texts import TokenTexts
from llmforge.serve.tool_calls import ToolCallReader

FINDERS = 64
ADAPTER_WAIT = 30.0  # seconds that a request waits until one of the adapters that answer makes room for its own

T = TypeVar("T")


def make_app(models: Models, settings: Settings) -> FastAPI:
    """Make the application that serves `models`; `app.state.traffic` is a `Traffic`, by which it is drained."""
    traffic = Traffic()
    metrics = Metrics(lambda: {id(model.engine): model.engine for model in models.all()}.values())
    server = _Server(models, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    app = FastAPI(
        title="llmforge",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.traffic = traffic
    app.add_middleware(Door, settings=settings, traffic=traffic, metrics=metrics)
    install_handlers(app)
    answered = {200: EVENTS, **errors(400, 404, 408, 413, 504)}

    @app.get("/health", response_class=PlainTextResponse, responses={503: {"description": "The server shuts down."}})
    async def health() -> Response:
        """Say whether new requests are taken."""
        if traffic.is_draining:
            return PlainTextResponse("draining", 503)
        return PlainTextResponse("ok")

    @app.get("/metrics", response_class=PlainTextResponse, responses=errors())
    async def read_metrics() -> Response:
        """Show the metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", response_model=ModelList, responses=errors())
    async def list_models() -> Response:
        """List the models."""
        return _json({"object": "list", "data": [_described(model) for model in models.all()]})

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=errors(400, 404))
    async def show_model(name: str) -> Response:
        """Show one model."""
        return _json(_described(await server.find(name)))

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=answered)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await server.chat(body, request)

    @app.post("/v1/completions", response_model=TextCompletion, responses=answered)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Go on with a text."""
        return await server.complete(body, request)

    @app.post("/tokenize", response_model=TokenizedPrompt, responses=errors(400, 404, 408, 413))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Show the token ids of a prompt, as the model would be fed them."""
        return await server.tokenize(body)

    @app.post("/v1/embeddings", status_code=400, response_model=ErrorReply, responses=errors(400, 404, 408, 413))
    async def embed(body: EmbeddingsRequest) -> Response:
        """Refuse: what is served here generates text."""
        model = await server.find(body.model)
        raise ApiError(
            400,
            f"{model.name} is a causal language model, which is trained to generate and has no embeddings of texts; "
            "use a model that was made for them",
            param="model",
            code="unsupported_model",
        )

    return app


@dataclass(frozen=True)
class _Asked:
    """The answers that one request asks for: `samplings` of each of `prompts`."""

    model: ServedModel
    prompts: Sequence[list[int]]
    samplings: Sequence[Sampling]
    stop: Sequence[str]
    reply: Reply
    choices: Sequence[Choice]
    includes_usage: bool


class _Server:
    """Turns requests into answers of the models."""

    def __init__(self, models: Models, settings: Settings, metrics: Metrics) -> None:
        self._models = models
        self._settings = settings
        self._metrics = metrics
        # Long prompts take a while to encode. One thread, so that others wait their turn and the event loop does not.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")
        # Enough of them that requests for adapters that are being loaded do not hold up the others.
        self._finding = ThreadPoolExecutor(FINDERS, thread_name_prefix="find")

    def close(self) -> None:
        """End the threads."""
        for executor in (self._encoding, self._finding):
            executor.shutdown(wait=False, cancel_futures=True)

    async def find(self, name: str | None) -> ServedModel:
        """Give a model by its name, loading it if it has to be; without a name, the only one that there is."""
        if name is not None:
            if (loaded := self._models.loaded(name)) is not None:
                return loaded
            deadline = time.monotonic() + ADAPTER_WAIT
            return await asyncio.get_running_loop().run_in_executor(self._finding, self._models.get, name, deadline)
        if self._models.default is None:
            names = ", ".join(model.name for model in self._models.all())
            raise ApiError(400, f"model is missing; name one of {names}", param="model")
        return self._models.default

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer `/v1/chat/completions`."""
        arrival = time.monotonic()
        model = await self.find(body.model)
        shown_tools = body.tools if body.may_call else None
        ids = await self._encode_chat(model, body.messages, body.tools, shown_tools, body.continue_final_message)
        given = body.given(len(model.encoder.tokenizer))
        if (schema := body.answer_schema()) is not None:
            given["grammar"] = await self._in_thread(_grammar, schema, "tools" if body.must_call else "response_format")
        sampling = self._sampling(model, ids, body.limit, logprobs=body.wanted_logprobs, **given)
        texts = TokenTexts(model.encoder.tokenizer) if body.logprobs else None
        limit = 1 if body.parallel_tool_calls is False else None
        samplings = _seeded(sampling, body.n or 1)
        choices = [
            ChatChoice(index, ToolCallReader(body.tool_names, limit) if body.may_call else None, texts)
            for index in range(len(samplings))
        ]
        reply = Reply("chat.completion", model.name)
        asked = _Asked(model, [ids], samplings, body.stop or (), reply, choices, body.includes_usage)
        return await self._answer(asked, request, bool(body.stream), arrival)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Answer `/v1/completions`."""
        arrival = time.monotonic()
        model = await self.find(body.model)
        vocabulary = len(model.encoder.tokenizer)
        given = body.given(vocabulary)
        prompts: list[list[int]] = []
        echoes: list[str] = []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                prompts.append(await self._in_thread(_encode_text, model, prompt, body.add_special_tokens))
                echo = prompt
            else:
                check_token_ids(prompt, vocabulary, "prompt")
                prompts.append(prompt)
                echo = await self._in_thread(model.encoder.decode, prompt) if body.echo else ""
            echoes.append(echo if body.echo else "")
        longest = max(prompts, key=len)
        sampling = self._sampling(model, longest, body.max_tokens, logprobs=body.logprobs, **given)
        texts = TokenTexts(model.encoder.tokenizer) if body.logprobs is not None else None
        samplings = _seeded(sampling, body.n or 1)
        choices = [
            TextChoice(index, echoes[index // len(samplings)], texts) for index in range(len(prompts) * len(samplings))
        ]
        reply = Reply("text_completion", model.name)
        asked = _Asked(model, prompts, samplings, body.stop or (), reply, choices, body.includes_usage)
        return await self._answer(asked, request, bool(body.stream), arrival)

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Answer `/tokenize`."""
        model = await self.find(body.model)
        if body.messages is not None:
            ids = await self._encode_chat(model, body.messages, body.tools, body.tools, body.continue_final_message)
        else:
            ids = await self._in_thread(_encode_text, model, body.prompt or "", body.add_special_tokens)
        shown: dict[str, Any] = {"count": len(ids), "max_model_len": model.context_length, "tokens": ids}
        if body.return_token_strs:
            shown["token_strs"] = await self._in_thread(model.encoder.tokenizer.convert_ids_to_tokens, ids)
        return _json(shown)

    async def _encode_chat(
        self,
        model: ServedModel,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] | None,
        shown_tools: Sequence[Tool] | None,
        continue_final_message: bool | None,
    ) -> list[int]:
        conversation = read_messages(messages, tools, continue_final_message)
        written = [tool.given for tool in shown_tools] if shown_tools else None
        return await self._in_thread(_encode_conversation, model, conversation, written, bool(continue_final_message))

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, function, *arguments)

    def _sampling(self, model: ServedModel, ids: Sequence[int], max_tokens: int | None, **given: Any) -> Sampling:
        """Complete a request's sampling; refuse a prompt that, with the answer asked for, is too long."""
        if len(ids) + (max_tokens or 1) > model.context_length:
            answer = f" and {max_tokens:,} are asked for" if max_tokens else ""
            raise ApiError(
                400,
                f"the prompt has {len(ids):,} tokens{answer}; the context of {model.name} holds "
                f"{model.context_length:,}, the answer included. Shorten the messages or ask for less",
                param="messages",
                code="context_length_exceeded",
            )
        return model.sampling(max_tokens=max_tokens, **given)

    async def _answer(self, asked: _Asked, request: Request, streams: bool, arrival: float) -> Response:
        if any(sampling.grammar for sampling in asked.samplings):  # compiled on the way: seconds for a large schema
            answers = await asyncio.to_thread(self._submit, asked)
        else:
            answers = self._submit(asked)
        name = asked.model.name
        self._metrics.prompt_tokens.labels(name).inc(sum(map(len, asked.prompts)))
        timeout = self._settings.request_timeout
        if streams:
            deadline = asyncio.get_running_loop().time() + timeout
            events = self._events(asked, answers, arrival)
            stall_timeout = self._settings.stall_timeout
            return EventStream(events, lambda: _cancel(answers), deadline=deadline, stall_timeout=stall_timeout)
        try:
            async with asyncio.timeout(timeout):
                return _json(await while_there(request.receive, self._whole(asked, answers, arrival)))
        except ClientLeftError:
            return Response(status_code=CLIENT_LEFT)
        finally:
            _cancel(answers)

    def _submit(self, asked: _Asked) -> list[Answer]:
        answers: list[Answer] = []
        try:
            for ids in asked.prompts:
                for sampling in asked.samplings:
                    answers.append(asked.model.answer(ids, sampling, stop=asked.stop))
        except Exception:
            _cancel(answers)  # all of them or none
            raise
        return answers

    async def _whole(self, asked: _Asked, answers: Sequence[Answer], arrival: float) -> dict[str, Any]:
        for choice in asked.choices:
            choice.open()
        async with aclosing(self._pieces(asked, answers, arrival)) as pieces:
            async for index, piece in pieces:
                asked.choices[index].read(piece)
        return asked.reply.whole([choice.whole() for choice in asked.choices], _usage(asked, answers))

    async def _events(
        self, asked: _Asked, answers: Sequence[Answer], arrival: float
    ) -> AsyncGenerator[Sequence[Mapping[str, Any]], None]:
        usage = {"usage": None} if asked.includes_usage else {}
        is_open: set[int] = set()
        async with aclosing(self._pieces(asked, answers, arrival)) as pieces:
            async for index, piece in pieces:
                choice = asked.choices[index]
                opening = [] if index in is_open else [choice.open()]
                is_open.add(index)
                yield [asked.reply.chunk([told], **usage) for told in (*opening, *choice.read(piece))]
        if asked.includes_usage:
            yield [asked.reply.chunk([], usage=_usage(asked, answers).as_json())]

    async def _pieces(
        self, asked: _Asked, answers: Sequence[Answer], arrival: float
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """Give the pieces of all answers, and measure them."""
        name = asked.model.name
        last: dict[int, float] = {}
        finished = 0
        try:
            async with aclosing(merge(answers)) as pieces:
                async for index, piece in pieces:
                    if piece.finish == "cancelled":
                        raise ApiError(503, "the server has stopped this answer", type="server_error", code="stopped")
                    now = time.monotonic()
                    if index in last:
                        self._metrics.inter_token.labels(name).observe(now - last[index])
                    else:
                        self._metrics.first_token.labels(name).observe(now - arrival)
                    last[index] = now
                    if piece.finish is not None:
                        finished += 1
                        self._metrics.answers.labels(name, piece.finish).inc()
                        self._metrics.duration.labels(name).observe(now - arrival)
                    yield index, piece
        finally:
            self._metrics.answers.labels(name, "cancelled").inc(len(answers) - finished)
            self._metrics.generated_tokens.labels(name).inc(sum(answer.completion_tokens for answer in answers))


def _cancel(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.cancel()


def _seeded(sampling: Sampling, count: int) -> list[Sampling]:
    """Give each of several answers a seed of its own, if there is one."""
    if sampling.seed is None:
        return [sampling] * count
    return [replace(sampling, seed=(sampling.seed + index) & LARGEST_SEED) for index in range(count)]


def _usage(asked: _Asked, answers: Sequence[Answer]) -> Usage:
    return Usage(sum(map(len, asked.prompts)), sum(answer.completion_tokens for answer in answers))


def _grammar(schema: Mapping[str, Any], param: str) -> str:
    try:
        return json_grammar(schema)
    except InputError as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from error


def _encode_conversation(
    model: ServedModel,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    continue_final_message: bool,
) -> list[int]:
    """Encode a conversation; refuse one whose calls of tools the format leaves out, as training does."""
    ids = model.encode(messages, tools, continue_final_message)
    if called := [call.get("function", call)["name"] for message in messages for call in message.get("tool_calls", ())]:
        text = model.encoder.decode(ids)
        if left_out := next((name for name in called if name not in text), None):
            raise ConversationError(f"the chat template leaves out the assistant's call of {shown(left_out)}")
    return ids


def _encode_text(model: ServedModel, text: str, add_special_tokens: bool) -> list[int]:
    """Encode a text to go on with: what training writes in front of a plain document, once, and the text."""
    encoder = model.encoder
    if add_special_tokens:
        bos = encoder.format.bos if isinstance(encoder.format, PromptFormat) else own_bos(encoder.tokenizer)
        text = text if text.startswith(bos) else bos + text
    return encoder.encode_text(text)


def _described(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "llmforge",
        "root": model.root,
        "max_model_len": model.context_length,
    }


def _json(content: Mapping[str, Any]) -> Response:
    return Response(json.dumps(content), media_type="application/json")
