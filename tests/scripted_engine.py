"""An engine that answers with given tokens, for tests of what stands above it."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmforge.errors import InputError
from llmforge.serve.requests import FinishReason, Listener, OverloadedError, Request, Token, Update


@dataclass
class ScriptedTicket:
    """A request that was taken; `told` counts the tokens that its listener has heard of."""

    request: Request
    cancelled: threading.Event = field(default_factory=threading.Event)
    told: int = 0

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedEngine:
    """Plays an engine: each request is answered with the tokens that `script` gives for it, from a thread of its own.

    Args:
        script: gives an answer's tokens, which may include the stop token. An exception among them ends the answer.
        chunks: how many tokens the updates bring, one after the other, the last number for all further ones.
        step: a semaphore that is taken before each update, to hold answers up; None does not wait.
        pause: seconds before each update.
        max_waiting: answers at once; further ones are refused.
    """

    def __init__(
        self,
        script: Callable[[Request], Sequence[int | Exception]],
        *,
        chunks: Sequence[int] = (1,),
        step: threading.Semaphore | None = None,
        pause: float = 0.0,
        context_length: int = 4096,
        max_waiting: int = 1_000,
    ) -> None:
        self.script = script
        self.pause = pause
        self.context_length = context_length
        self.adapters: dict[str, Path] = {}
        self.tickets: list[ScriptedTicket] = []
        self.is_closed = False
        self._chunks, self._step, self._max_waiting = chunks, step, max_waiting
        self._running: list[ScriptedTicket] = []

    @property
    def requests(self) -> list[Request]:
        return [ticket.request for ticket in self.tickets]

    @property
    def told(self) -> int:
        """Tokens, of all answers."""
        return sum(ticket.told for ticket in self.tickets)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, request: Request, listener: Listener) -> ScriptedTicket:
        if request.adapter is not None and request.adapter not in self.adapters:
            raise InputError(f"there is no adapter {request.adapter}")
        if self.running >= self._max_waiting:
            raise OverloadedError("too many requests are waiting", 2.5)
        ticket = ScriptedTicket(request)
        self.tickets.append(ticket)
        self._running.append(ticket)
        threading.Thread(target=self._play, args=(ticket, listener, self.script(request)), daemon=True).start()
        return ticket

    def _play(self, ticket: ScriptedTicket, listener: Listener, script: Sequence[int | Exception]) -> None:
        sampling = ticket.request.sampling
        ids = list(script)
        stops = () if sampling.ignore_stops else ticket.request.stop_token_ids
        end = next((place for place, token in enumerate(ids, 1) if token in stops), None)
        finish: FinishReason = "length" if end is None or end > sampling.max_tokens else "stop"
        ids = ids[: min(end or len(ids), sampling.max_tokens)]
        chunks = list(self._chunks)
        last = Update((), finish)
        while ids:
            count = chunks.pop(0) if len(chunks) > 1 else chunks[0]
            if self._step is not None:
                self._step.acquire()
            time.sleep(self.pause)
            if ticket.cancelled.is_set():
                last = Update((), "cancelled")
                break
            if isinstance(ids[0], Exception):
                last = Update((), error=ids[0])
                break
            now, ids = ids[:count], ids[count:]
            ticket.told += len(now)
            tokens = tuple(_token(token, sampling.logprobs) for token in now if isinstance(token, int))
            if not ids:
                last = Update(tokens, finish)
                break
            listener(Update(tokens))
        self._running.remove(ticket)
        listener(last)

    def add_adapter(self, name: str, directory: Any) -> None:
        self.adapters[name] = Path(directory)

    def remove_adapter(self, name: str) -> None:
        del self.adapters[name]

    def stats(self) -> dict[str, float]:
        return {"running": self.running, "waiting": 0, "cached_tokens": 0}

    def close(self) -> None:
        self.is_closed = True
        for ticket in list(self._running):
            ticket.cancel()
            if self._step is not None:
                self._step.release()


def _token(token: int, logprobs: int | None) -> Token:
    if logprobs is None:
        return Token(token)
    return Token(token, -0.5, tuple((token + index, -0.5 - index) for index in range(logprobs)))
