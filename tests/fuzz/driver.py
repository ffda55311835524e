"""Hands requests to the server's application, without a network, and judges what comes back."""

import asyncio
import json
from typing import Any

from fastapi import FastAPI

ERROR = {"message", "type", "param", "code"}


def fault_of(status: int, content_type: str, text: str) -> str | None:
    """Say what is wrong with an answer, whatever was asked; None: nothing."""
    if status >= 500:
        return f"status {status}"
    try:
        if content_type.startswith("text/event-stream"):
            *events, end = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
            failed = [event for event in events if "error" in _read(event)]
            return f"an error in the stream: {failed[0]}" if failed else None if end == "[DONE]" else "no [DONE]"
        body = _read(text)
    except ValueError as error:
        return f"no JSON: {error}"
    if status != 200 and not (status < 500 and set(body.get("error", ())) == ERROR and body["error"]["message"]):
        return "an error that is not of OpenAI's shape"
    return None


def _read(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


class Driver:
    """Calls an application as a server would."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._loop = asyncio.new_event_loop()

    def post(self, path: str, body: bytes) -> tuple[int, str, str]:
        """Send a body as JSON; give status, type and text of the answer."""
        return self._loop.run_until_complete(self._post(path, body))

    async def _post(self, path: str, body: bytes) -> tuple[int, str, str]:
        incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        }
        await self._app(scope, incoming.get, send)
        start, *parts = sent
        headers = dict(start["headers"])
        text = b"".join(part.get("body", b"") for part in parts).decode()
        return start["status"], headers[b"content-type"].decode(), text
