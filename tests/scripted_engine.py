"""An engine that says what it is told to, at the pace it is told to, for the tests of what stands above engines."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmforge.serve.requests import Listener, OverloadedError, Request, Token, Update


@dataclass
class ScriptedTicket:
    """A request that the engine has taken; `told` counts the tokens that its listener has heard of."""

    request: Request
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    told: int = 0

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedEngine:
    """Answers each request with the tokens that `script` gives for it, one every `pause` seconds.

    It draws log-probabilities from the token ids, stops where a request says, and keeps every ticket in `tickets`.

    Args:
        script: the tokens of an answer; an exception among them ends the answer with it.
        places: how many requests it answers at once; all further ones are refused.
    """

    def __init__(
        self,
        script: Callable[[Request], Sequence[int | Exception]],
        *,
        pause: float = 0.0,
        context_length: int = 512,
        places: int = 1000,
    ) -> None:
        self.script = script
        self.pause = pause
        self.context_length = context_length
        self.places = places
        self.tickets: list[ScriptedTicket] = []
        self.adapters: dict[str, Any] = {}

    def submit(self, request: Request, listener: Listener) -> ScriptedTicket:
        if self.running >= self.places:
            raise OverloadedError(f"{self.places} requests are being answered; try later", retry_after=2.5)
        ticket = ScriptedTicket(request)
        self.tickets.append(ticket)
        threading.Thread(target=self._answer, args=(ticket, listener), daemon=True).start()
        return ticket

    @property
    def running(self) -> int:
        return sum(not ticket.ended.is_set() for ticket in self.tickets)

    def add_adapter(self, name: str, directory: Any) -> None:
        self.adapters[name] = directory

    def remove_adapter(self, name: str) -> None:
        del self.adapters[name]

    def stats(self) -> dict[str, float]:
        return {"running": self.running, "waiting": 0, "cached_tokens": 0}

    def close(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    def _answer(self, ticket: ScriptedTicket, listener: Listener) -> None:
        listener(self._last(ticket, listener))
        ticket.ended.set()

    def _last(self, ticket: ScriptedTicket, listener: Listener) -> Update:
        """Tell of the tokens, and give the last update."""
        request = ticket.request
        stops = frozenset() if request.sampling.ignore_stops else request.stop_token_ids
        for token in itertools.islice(self.script(request), request.sampling.max_tokens):
            if ticket.cancelled.is_set():
                return Update((), "cancelled")
            if isinstance(token, Exception):
                return Update((), error=token)
            time.sleep(self.pause)
            ticket.told += 1
            told = self._token(token, request.sampling.logprobs)
            if token in stops:
                return Update((told,), "stop")
            listener(Update((told,)))
        return Update((), "length")

    def _token(self, token: int, logprobs: int | None) -> Token:
        if logprobs is None:
            return Token(token)
        top = tuple((token + index, -0.5 - index) for index in range(logprobs))
        return Token(token, -0.5, top)
