"""An engine that answers with given tokens, for tests of what stands above it."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmforge.errors import InputError
from llmforge.serve.requests import Listener, OverloadedError, Request, Ticket, Token, Update


class ScriptedEngine:
    """Plays an engine: each request is answered with the tokens that `script` gives for it, from a thread of its own.

    Args:
        script: gives an answer's tokens, which may include the stop token.
        chunks: how many tokens the updates bring, one after the other, the last number for all further ones.
        step: a semaphore that is taken before each update, to hold answers up; None does not wait.
        max_waiting: answers at once; further ones are refused.
    """

    def __init__(
        self,
        script: Callable[[Request], Sequence[int]],
        *,
        chunks: Sequence[int] = (1,),
        step: threading.Semaphore | None = None,
        context_length: int = 4096,
        max_waiting: int = 1_000,
    ) -> None:
        self.context_length = context_length
        self.adapters: dict[str, Path] = {}
        self.requests: list[Request] = []
        self.told = 0  # tokens, of all answers
        self.is_closed = False
        self._script, self._chunks, self._step, self._max_waiting = script, chunks, step, max_waiting
        self._running: list[_Ticket] = []

    def submit(self, request: Request, listener: Listener) -> Ticket:
        if request.adapter is not None and request.adapter not in self.adapters:
            raise InputError(f"there is no adapter {request.adapter}")
        if len(self._running) >= self._max_waiting:
            raise OverloadedError("too many requests are waiting", 1.0)
        self.requests.append(request)
        ticket = _Ticket()
        self._running.append(ticket)
        ticket.thread = threading.Thread(target=self._play, args=(request, listener, ticket), daemon=True)
        ticket.thread.start()
        return ticket

    def _play(self, request: Request, listener: Listener, ticket: "_Ticket") -> None:
        ids = list(self._script(request))
        stopped = next((i for i, token in enumerate(ids) if token in request.stop_token_ids), None)
        finish: Any = "stop" if stopped is not None and not request.sampling.ignore_stops else "length"
        ids = ids[: stopped + 1] if finish == "stop" and stopped is not None else ids
        if len(ids) > request.sampling.max_tokens:
            ids, finish = ids[: request.sampling.max_tokens], "length"
        chunks = list(self._chunks)
        while ids:
            count = chunks.pop(0) if len(chunks) > 1 else chunks[0]
            if self._step is not None:
                self._step.acquire()
            if ticket.cancelled.is_set():
                break
            now, ids = ids[:count], ids[count:]
            self.told += len(now)
            listener(Update(tuple(map(Token, now)), None if ids else finish))
            if not ids:
                self._running.remove(ticket)
                return
        self._running.remove(ticket)
        listener(Update((), "cancelled" if ticket.cancelled.is_set() else finish))

    def add_adapter(self, name: str, directory: Any) -> None:
        self.adapters[name] = Path(directory)

    def remove_adapter(self, name: str) -> None:
        del self.adapters[name]

    def stats(self) -> dict[str, float]:
        return {"running": len(self._running), "waiting": 0, "cached_tokens": 0}

    def close(self) -> None:
        self.is_closed = True
        for ticket in list(self._running):
            ticket.cancel()
            if self._step is not None:
                self._step.release()


class _Ticket:
    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.thread: threading.Thread

    def cancel(self) -> None:
        self.cancelled.set()
