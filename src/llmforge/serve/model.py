"""A model under the name that clients ask for: its prompt format, its stop rules, its defaults, and its answers."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

from llmforge.errors import InputError
from llmforge.prompt import Encoder, Message, StopRules
from llmforge.serve.requests import Engine, FinishReason, Request, Sampling, Ticket, Token, Update
from llmforge.serve.text import TextStream, find_byte_tokens

DEFAULT_NEW_TOKENS = 512
_CHOOSING = ("temperature", "top_p", "top_k", "min_p")  # to give one of them is to ask for sampling
# Options of transformers' `generate` that an answer has: the values that each takes, in code and in words.
_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda value: isinstance(value, int) and value >= 1, "a whole number from 1"),
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: value >= 0, "a number from 0"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "top_k": (lambda value: isinstance(value, int) and value >= 0, "a whole number from 0"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "a number above 0"),
    "seed": (lambda value: isinstance(value, int), "a whole number"),
}


@dataclass(eq=False)
class ServedModel:
    """A model that can be asked.

    Args:
        root: the directory that it was loaded from.
        created: when it was trained or, where nobody knows, loaded; in seconds since 1970.
        adapter: the name under which the engine knows it; None is the engine's own model.
        defaults: fields of the artifact's `generation_config.json` that were set.
    """

    name: str
    root: str
    created: int
    encoder: Encoder
    stop: StopRules
    engine: Engine
    adapter: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._byte_tokens = find_byte_tokens(self.encoder)
        # Takes off what the tokenizer's file says of truncation, which must not happen while another thread encodes.
        self.encoder.encode_text("")

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together."""
        return self.engine.context_length

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Encode a conversation as training did. Raises ConversationError where training would have refused it."""
        return self.encoder.encode_prompt(messages, tools, continue_final_message)

    def sampling(self, *, max_tokens: int | None = None, **given: Any) -> Sampling:
        """Complete what a request asks for with the model's defaults.

        Without a temperature, a model answers as its artifact says: greedily unless it samples there, or unless the
        request gives another option that only sampling reads.

        Args:
            max_tokens: None is the artifact's, or as many as the context holds.
            given: fields of `Sampling`; those that are None count as not given.
        """
        given = {name: value for name, value in given.items() if value is not None}
        set_here = {name: value for name, value in self.defaults.items() if name in (*_CHOOSING, "repetition_penalty")}
        samples = self.defaults.get("do_sample") or any(name in given for name in _CHOOSING)
        fields = {"temperature": 1.0, **set_here, **given} if samples else {**set_here, **given, "temperature": 0.0}
        if max_tokens is None:
            max_tokens = self.defaults.get("max_new_tokens") or self.context_length
        return Sampling(max_tokens=max_tokens, **fields)

    def options(self, **options: Any) -> Sampling:
        """Read options as transformers' `generate` names them (max_new_tokens, temperature, do_sample, …).

        An answer has at most `DEFAULT_NEW_TOKENS` where neither they nor the artifact say otherwise.

        Raises:
            InputError: an option that is none of them, or a value that none of them takes.
        """
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            raise InputError(f"given {', '.join(unknown)}; options of an answer are {', '.join(_OPTIONS)}")
        given = {name: value for name, value in options.items() if value is not None}
        for name, value in given.items():
            is_allowed, allowed = _OPTIONS[name]
            if not isinstance(value, int | float) or not is_allowed(value):
                raise InputError(f"given {name} {value!r}; allowed is {allowed}")
        longest = self.defaults.get("max_new_tokens") or DEFAULT_NEW_TOKENS
        max_tokens, do_sample = given.pop("max_new_tokens", longest), given.pop("do_sample", None)
        if do_sample is False:
            given["temperature"] = 0.0
        elif do_sample:
            given.setdefault("temperature", self.defaults.get("temperature", 1.0))
        return self.sampling(max_tokens=max_tokens, **given)

    def answer(self, prompt_ids: Sequence[int], sampling: Sampling, *, stop: Sequence[str] = ()) -> "Answer":
        """Have the engine answer.

        Args:
            prompt_ids: of `encode`, or any others.
            sampling: `max_tokens` counts as far as the context goes.
            stop: strings that end this answer, besides the model's own.

        Raises:
            OverloadedError: too many requests are waiting.
            InputError: the prompt fills the context.
        """
        room = self.context_length - len(prompt_ids)
        if not prompt_ids:
            raise InputError("the prompt is empty; a model needs at least one token to go on from")
        if room < 1:
            raise InputError(
                f"the prompt has {len(prompt_ids)} tokens and the model's context holds {self.context_length}, the "
                "answer included; shorten the prompt"
            )
        rules = self.stop if not stop else self.stop.model_copy(update={"sequences": (*self.stop.sequences, *stop)})
        if sampling.ignore_stops:
            rules = StopRules()
        text = TextStream(self.encoder, rules, self._byte_tokens, prompt_ids)
        updates = _Updates()
        request = Request(
            prompt_ids,
            replace(sampling, max_tokens=min(sampling.max_tokens, room)),
            frozenset(rules.token_ids),
            self.adapter,
        )
        ticket = self.engine.submit(request, updates.put)
        return Answer(self, ticket, updates, text, request)


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer: text, and the tokens that made it readable. The last one has `finish`."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None


class Answer:
    """An answer that is being generated. It is iterated once, either way; whoever leaves early cancels it.

    The stop token, and tokens of nothing but a stop sequence, are in no piece. `completion_tokens` counts the first.
    """

    def __init__(
        self, model: ServedModel, ticket: Ticket, updates: "_Updates", text: TextStream, request: Request
    ) -> None:
        self.model = model
        self.prompt_tokens = len(request.prompt_ids)
        self.completion_tokens = 0
        self._ticket = ticket
        self._updates = updates
        self._text = text
        self._stop_token_ids = request.stop_token_ids
        self._untold: deque[tuple[int, Token]] = deque()  # with where its text begins

    def cancel(self) -> None:
        """Give up the answer; from any thread."""
        self._ticket.cancel()

    def __iter__(self) -> Iterator[Piece]:
        try:
            finish = None
            while finish is None:
                piece = self._read(self._updates.get())
                if piece is not None:
                    finish = piece.finish
                    yield piece
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            async for update in self._updates:
                piece = self._read(update)
                if piece is not None:
                    yield piece
                    if piece.finish is not None:
                        return
        finally:
            self.cancel()

    def _read(self, update: Update) -> Piece | None:
        """Turn an update into a piece; None where it makes nothing readable."""
        tokens, finish = update.tokens, update.finish
        has_stop_token = finish == "stop" and bool(tokens) and tokens[-1].id in self._stop_token_ids
        text = ""
        for token in tokens[:-1] if has_stop_token else tokens:
            self._untold.append((self._text.settled, token))
            self.completion_tokens += 1
            text += self._text.push(token.id)
            if self._text.is_stopped:
                break
        else:
            self.completion_tokens += has_stop_token
            if update.error is not None:
                raise update.error
            if finish is not None:
                text += self._text.finish()
        if self._text.is_stopped:
            self.cancel()
            finish = "stop"
        if not text and finish is None:
            return None
        return Piece(text, tuple(self._tell(finish)), finish)

    def _tell(self, finish: FinishReason | None) -> Iterator[Token]:
        whole = finish is not None and not self._text.is_stopped
        while self._untold and (whole or self._untold[0][0] < self._text.shown):
            yield self._untold.popleft()[1]


class _Updates:
    """Hands updates from the engine's thread to whoever reads the answer, a thread or a task."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Update] = SimpleQueue()
        self._wake: Callable[[], None] = lambda: None

    def put(self, update: Update) -> None:
        self._queue.put(update)
        self._wake()

    def get(self) -> Update:
        """Wait for the next update in this thread."""
        return self._queue.get()

    async def __aiter__(self) -> AsyncIterator[Update]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(arrived.set)

        self._wake = wake
        while True:
            arrived.clear()
            with contextlib.suppress(Empty):
                while True:
                    yield self._queue.get_nowait()
            await arrived.wait()
