"""Answers as they go out: whole or as server-sent events, given up when the client leaves, stalls or waits too long."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmforge.serve.failures import as_api_error, error_response
from llmforge.serve.model import Answer, Piece

QUEUED_PIECES = 64

T = TypeVar("T")

logger = logging.getLogger("llmforge.serve")


class ClientLeftError(Exception):
    """Nobody waits for the answer any more, or nobody reads it."""


async def merge(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Give the pieces of several answers as they come, each with the index of its answer."""
    if len(answers) == 1:
        async for piece in answers[0]:
            yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(QUEUED_PIECES)

    async def read(index: int) -> None:
        try:
            async for piece in answers[index]:
                await queue.put((index, piece))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(read(index)) for index in range(len(answers))]
    try:
        unfinished = len(tasks)
        while unfinished:
            index, read_piece = await queue.get()
            if isinstance(read_piece, Exception):
                raise read_piece
            unfinished -= read_piece.finish is not None
            yield index, read_piece
    finally:
        for task in tasks:
            task.cancel()


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do something as long as the client is there. Raises ClientLeftError when it leaves before the end."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_departure(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        watcher.cancel()
        if task.cancel():
            await asyncio.wait({task})


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, ended by `[DONE]`.

    The status is sent with the first event, so that what fails before it is answered with a status of its own.

    Args:
        events: the objects to send, those of one list at once.
        give_up: called when there is nobody to send to any more, and at the end.
        deadline: when, on the event loop's clock, the last one has to be out.
        stall_timeout: seconds that the client may leave what was sent unread.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Sequence[Mapping[str, Any]], None],
        give_up: Callable[[], None],
        *,
        deadline: float,
        stall_timeout: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._events = events
        self._give_up = give_up
        self._deadline = deadline
        self._stall_timeout = stall_timeout
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientLeftError):
                await while_there(receive, self._run(scope, receive, send))
        finally:
            self._give_up()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._deadline), aclosing(self._events) as events:
                async for batch in events:
                    await self._send(send, *(json.dumps(event) for event in batch))
        except ClientLeftError:
            raise
        except Exception as error:
            failure = as_api_error(error)
            if not self._is_started:
                await error_response(failure)(scope, receive, send)
                return
            await self._send(send, json.dumps(failure.body))
        await self._send(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, *events: str) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout):
                if not self._is_started:
                    self._is_started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                body = "".join(f"data: {event}\n\n" for event in events).encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except TimeoutError:
            logger.warning(
                "a client left its stream unread for %g seconds; its answer is given up", self._stall_timeout
            )
            raise ClientLeftError from None
