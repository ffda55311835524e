"""What every request passes before anything reads it: key, drain, bounds, and the count of what is under way."""

import asyncio
import contextlib
import hmac
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmforge.serve.failures import as_api_error, error_response
from llmforge.serve.metrics import Metrics
from llmforge.serve.openai import ApiError

OPEN_PATHS = ("/health",)  # asked by load balancers, which have no key
WATCHING_PATHS = ("/health", "/metrics")  # answered while draining, and not counted as under way
RETRY_AFTER = 5  # seconds
DISCARDED = 8  # times the largest body: how much of a larger one is read, so that its sender comes to read the answer
CLIENT_LEFT = 499  # no client sees it; the status under which such requests are counted


_CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class Settings:
    """Bounds of a server.

    Args:
        api_keys: a client must have one of them; with none, no key is asked for.
        request_timeout: seconds from a request to the end of its answer.
        stall_timeout: seconds that a client may leave a stream unread, or take to send a body.
        max_body_bytes: of one request.
        max_requests: under way at once, whatever the engine's own queue holds.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    request_timeout: float = 600.0
    stall_timeout: float = 60.0
    max_body_bytes: int = 8 * 2**20
    max_requests: int = 1024


class Traffic:
    """How many requests are under way, and whether new ones are taken."""

    def __init__(self) -> None:
        self.under_way = 0
        self.is_draining = False

    def drain(self) -> None:
        """Take no further requests."""
        self.is_draining = True


class Door:
    """The ASGI middleware that lets requests in."""

    def __init__(self, app: ASGIApp, settings: Settings, traffic: Traffic, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._traffic = traffic
        self._metrics = metrics
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        counts = scope["path"] not in WATCHING_PATHS
        try:
            if refusal := self._refusal(scope):
                if "Connection" in refusal.headers and not _waits_to_send(scope):
                    await self._discard(receive)
                await error_response(refusal)(scope, receive, counted)
                return
            self._traffic.under_way += counts
            try:
                await self._app(scope, self._bounded(receive), counted)
            except Exception as error:
                # To let it through would end the connection, and with it the request that comes next on it.
                if status != CLIENT_LEFT:
                    raise
                await error_response(as_api_error(error))(scope, receive, counted)
            finally:
                self._traffic.under_way -= counts
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(headers.get(b"authorization", b"")):
            return ApiError(
                401,
                "wrong or missing API key; send the header Authorization: Bearer KEY, with a key that the server was "
                "started with",
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        retry = {"Retry-After": str(RETRY_AFTER)}
        if self._traffic.is_draining and scope["path"] not in WATCHING_PATHS:
            return ApiError(
                503,
                "the server is shutting down and takes no further requests",
                type="server_error",
                code="shutting_down",
                headers={**retry, **_CLOSE},
            )
        if self._traffic.under_way >= self._settings.max_requests and scope["path"] not in WATCHING_PATHS:
            return ApiError(
                429,
                f"{self._traffic.under_way} requests are under way, which is as many as the server takes; try later",
                type="rate_limit_error",
                code="overloaded",
                headers=retry,
            )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._settings.max_body_bytes:
            return ApiError(413, self._too_large(), code="body_too_large", headers=_CLOSE)
        return None

    def _has_key(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        # All are compared, each in constant time, so that the time taken says nothing of any of them.
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)

    def _bounded(self, receive: Receive) -> Receive:
        """Bound the bytes of a body, and the time it takes to come."""
        size, is_whole = 0, False

        async def bounded() -> Message:
            nonlocal size, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout(self._settings.stall_timeout):
                    message = await receive()
            except TimeoutError:
                seconds = f"{self._settings.stall_timeout:g}"
                raise HTTPException(408, f"the body did not come within {seconds} seconds", headers=_CLOSE) from None
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > self._settings.max_body_bytes:
                if not is_whole:
                    await self._discard(receive)
                raise HTTPException(413, self._too_large(), headers=_CLOSE)
            return message

        return bounded

    async def _discard(self, receive: Receive) -> None:
        """Read the rest of a body and keep nothing of it, within bounds.

        Most clients send all of a body before they look for an answer; one that comes with the end of the connection
        while they still send is lost to them.
        """
        left = DISCARDED * self._settings.max_body_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.stall_timeout):
                while left > 0:
                    message = await receive()
                    if not message.get("more_body", False):
                        return
                    left -= len(message["body"])

    def _too_large(self) -> str:
        return f"the body is larger than {self._settings.max_body_bytes:,} bytes, the most that this server reads"


def _waits_to_send(scope: Scope) -> bool:
    """Say whether a client sends its body only if it is asked to, as curl does with large ones."""
    return any(name == b"expect" and value.lower() == b"100-continue" for name, value in scope["headers"])
