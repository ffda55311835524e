"""Real HTTP in the tests: an application on a port of its own, in a thread."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from llmforge.serve.app import make_app
from llmforge.serve.door import Settings
from llmforge.serve.model import ServedModel
from llmforge.serve.models import Models


@contextmanager
def served(model: ServedModel, settings: Settings | None = None) -> Iterator[str]:
    """Serve a model; give the URL."""
    models = Models()
    models.put(model)
    with all_served(models, settings) as url:
        yield url


@contextmanager
def all_served(models: Models, settings: Settings | None = None) -> Iterator[str]:
    """Serve models; give the URL."""
    config = uvicorn.Config(
        make_app(models, settings or Settings()), log_level="error", lifespan="on", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:  # else asyncio leaves Nagle on
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)  # who comes before the server does is not refused
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
