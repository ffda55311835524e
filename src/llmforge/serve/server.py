"""Runs the application under uvicorn: on a socket that is taken before models load, until it has drained."""

import contextlib
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from llmforge.errors import InputError
from llmforge.serve.door import Traffic

KEEP_ALIVE = 75  # seconds; longer than clients keep their connections, so that it is they who close them
CLOSING = 5  # seconds for connections to close once everything is answered


def take_port(host: str, port: int, *, stall_timeout: float) -> socket.socket:
    """Take a port; 0 takes a free one.

    Args:
        stall_timeout: seconds after which the system drops a connection whose other end takes nothing any more.

    Raises:
        InputError: the port is in use, or there is no such host here.
    """
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        # With its protocol named, asyncio switches off Nagle's algorithm, which would hold back answers for 40 ms.
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(AttributeError, OSError):  # Linux; connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_timeout * 1000))
        listener.bind(address)
    except (OSError, OverflowError) as error:
        if listener is not None:
            listener.close()
        raise InputError(
            f"cannot listen on port {port} of {host}: {error}; choose another --port (0 takes a free one) or --host"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Give the URL under which a listening socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(app: FastAPI, listener: socket.socket, *, ready: Callable[[], None], say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; then finish what was accepted and return. A second signal ends the program.

    Args:
        app: of `make_app`.
        ready: called when requests are taken.
        say: told what happens at the end.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=CLOSING,
    )
    _Server(config, app.state.traffic, ready, say).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Keeps listening while it drains, so that new requests are told so instead of finding nobody."""

    def __init__(
        self, config: uvicorn.Config, traffic: Traffic, ready: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._traffic = traffic
        self._ready = ready
        self._say = say
        self._has_said = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._traffic.is_draining:
            os._exit(128 + sig)
        self._traffic.drain()

    async def on_tick(self, counter: int) -> bool:
        if self._traffic.is_draining and not self._has_said:
            self._has_said = True
            count = self._traffic.under_way
            waits = f"; {count} requests are being finished, a second signal drops them" if count else ""
            self._say(f"shutting down{waits}")
        return await super().on_tick(counter) or (self._traffic.is_draining and not self._traffic.under_way)
