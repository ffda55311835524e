"""Measures what HTTP adds to the time to the first piece of text.

    python first_token.py ARTIFACT PROMPTS.json ROUNDS

PROMPTS.json is a list of conversations. One process has the engine, the server over it and a client; in every round
each conversation is asked directly and over HTTP, one right after the other, in turns: what the machine does
meanwhile falls on both. Prints two JSON lists of seconds for each conversation and round: directly, and over HTTP.
"""

import json
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import uvicorn

from llmforge.models.source import ModelSource
from llmforge.serve.app import make_app
from llmforge.serve.door import Settings
from llmforge.serve.model import ServedModel
from llmforge.serve.models import Loading, Models
from llmforge.serve.offline import stream
from llmforge.serve.server import take_port, url_of

NEW_TOKENS = 4  # all are read, so that the next conversation finds an engine that does nothing


def direct(model: ServedModel, messages: list[dict[str, Any]]) -> float:
    """Give the seconds from a conversation to the first text, as the server itself calls its engine."""
    began = time.perf_counter()
    pieces = stream(model, messages, {"max_new_tokens": NEW_TOKENS, "do_sample": False})
    next(pieces)
    seconds = time.perf_counter() - began
    for _ in pieces:
        pass
    return seconds


def over_http(url: str, messages: list[dict[str, Any]]) -> float:
    """Give the seconds from sending a conversation to the first text."""
    began = time.perf_counter()
    body = {"messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    seconds = 0.0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if not seconds and line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if any(choice["delta"].get("content") for choice in choices):
                    seconds = time.perf_counter() - began
    return seconds


def serve(models: Models) -> tuple[uvicorn.Server, socket.socket, threading.Thread]:
    """Start the server in a thread."""
    listener = take_port("127.0.0.1", 0, stall_timeout=60)
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(make_app(models, Settings()), log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    return server, listener, thread


def main() -> None:
    artifact, prompts, rounds = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    models = Models()
    model = models.add("model", ModelSource(str(artifact), artifact), Loading("fp32"))
    server, listener, thread = serve(models)
    url = url_of(listener)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for place, messages in enumerate(prompts):
            ways = [(0, lambda m=messages: direct(model, m)), (1, lambda m=messages: over_http(url, m))]
            for way, ask in reversed(ways) if (number + place) % 2 else ways:
                taken = ask()
                if number:  # the first round makes kernels and memory
                    seconds[way].append(taken)
    server.should_exit = True
    thread.join()
    models.close()
    for each in seconds:
        print(json.dumps(each))


if __name__ == "__main__":
    main()
