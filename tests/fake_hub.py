"""A model hub on the loopback interface, good enough for huggingface_hub to download from. It serves directories.

As at the real one, weights lie in a store on another host, to which the hub redirects. Files may be damaged on the way.
"""

import hashlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from faulty_store import QuietServer

COMMIT = "c0ffee" + "0" * 34
STORED = (".safetensors", ".bin")  # files in the store


UNSEEN = {"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}  # what is listed of files that are refused


@dataclass(frozen=True)
class Refusal:
    """What the hub answers instead of the model; `files_only` lets everybody see that the model exists."""

    status: int
    code: str = ""
    files_only: bool = False


@dataclass(frozen=True)
class Versions:
    """A model with several revisions: the commit and the files of each branch or tag."""

    branches: Mapping[str, tuple[str, Path]]

    def find(self, revision: str) -> tuple[str, Path] | None:
        """Find the commit and the files of a branch, tag or commit."""
        return self.branches.get(revision) or {commit: (commit, files) for commit, files in self.branches.values()}.get(
            revision
        )


PRIVATE = Refusal(401, "RepoNotFound")  # also what the hub says of a missing model to somebody it does not know
MISSING = Refusal(404, "RepoNotFound")
NO_REVISION = Refusal(404, "RevisionNotFound")
NO_FILE = Refusal(404, "EntryNotFound")
GATED = Refusal(403, "GatedRepo", files_only=True)
GATED_FOR_STRANGERS = Refusal(401, "GatedRepo", files_only=True)
FORBIDDEN = Refusal(403)
BROKEN = Refusal(500)
NO_HUB = Refusal(200)  # a web site that answers everything, but not as a hub does


class Request(NamedTuple):
    """What has been asked; `part` is the Range header, `host` the address that was spoken to."""

    method: str
    path: str
    authorization: str | None
    part: str | None
    host: str


@dataclass
class FakeHub:
    """The hub, what it has been asked, and what goes wrong in it."""

    models: Mapping[str, Path | Versions | Refusal]
    token: str | None = None  # without it, models are PRIVATE
    url: str = ""
    store: str = ""
    requests: list[Request] = field(default_factory=list)
    cuts: int = 0  # how many more answers of the store end half-way
    lost: str = ""  # a file of which one half comes, and then nothing can be read from the connection any more
    damaged: str = ""  # a file whose last bytes come out as others
    short: str = ""  # a file that lacks its last bytes
    stalled: str = ""  # a file of which one half comes, and the rest when `go_on` is set
    half_sent: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    @property
    def tokens(self) -> set[str | None]:
        """The Authorization headers that the hub itself was sent."""
        return {request.authorization for request in self.requests if request.host == self.url}

    @property
    def stored(self) -> list[Request]:
        """What the store was asked for."""
        return [request for request in self.requests if request.host == self.store]


@contextmanager
def fake_hub(models: Mapping[str, Path | Versions | Refusal], token: str | None = None) -> Iterator[FakeHub]:
    """Serve models by their name, such as `org/tiny`, until the block ends."""
    hub = FakeHub(models, token)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        name = ""  # of the file that is being sent

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def note(self, host: str) -> str:
            path = unquote(urlsplit(self.path).path)
            headers = self.headers
            hub.requests.append(Request(self.command, path, headers.get("Authorization"), headers.get("Range"), host))
            return path

        def _answer(self) -> None:
            path = self.note(hub.url)
            is_api = path.startswith("/api/models/")
            parts = path.removeprefix("/api/models").strip("/").split("/")
            name = "/".join(parts[:2])
            model = hub.models.get(name, MISSING)
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                model = PRIVATE
            if isinstance(model, Refusal):
                if not (model.files_only and is_api):
                    self.refuse(model)
                    return
                found: tuple[str, Path] | None = (COMMIT, Path("/nowhere"))
            else:
                versions = model if isinstance(model, Versions) else Versions({"main": (COMMIT, model)})
                found = versions.find(parts[3] if len(parts) > 3 else "main")
            if found is None:
                self.refuse(NO_REVISION)
                return
            commit, directory = found
            if is_api:
                files = sorted(file for file in directory.rglob("*") if file.is_file())
                tree = [_entry(file, directory) for file in files] or [UNSEEN]
                answer = tree if parts[2:3] == ["tree"] else {"id": name, "sha": commit, "siblings": []}
                self.send(json.dumps(answer).encode())
            else:
                self._send_file(directory, "/".join(parts[4:]), commit)

        def _send_file(self, directory: Path, name: str, commit: str) -> None:
            """Send a small file; of a large one, as the hub does, the address of the store that holds it."""
            file = directory / name
            if not file.is_file():
                self.refuse(NO_FILE)
                return
            entry = _entry(file, directory)
            headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": commit}
            if lfs := entry.get("lfs"):
                headers |= {"X-Linked-Etag": f'"{lfs["oid"]}"', "X-Linked-Size": str(lfs["size"])}
                self.send(b"", 302, {**headers, "Location": f"{hub.store}{quote(str(file))}?signature=x"})
            else:
                self.name = file.name
                self.send(_as_it_comes(hub, file), 200, headers)

        def refuse(self, refusal: Refusal) -> None:
            self.send(b"<html>no</html>", refusal.status, {"X-Error-Code": refusal.code} if refusal.code else {})

        def send(self, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.write(content)

        def write(self, content: bytes) -> None:
            half = len(content) // 2
            self.wfile.write(content[:half])
            if self.name and self.name == hub.lost:
                time.sleep(0.2)  # what is under way when a connection is reset never arrives
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
                self.close_connection = True
                return
            if self.name and self.name == hub.stalled:
                hub.half_sent.set()
                hub.go_on.wait(30)
            with suppress(OSError):  # the one who asked may have been killed
                self.wfile.write(content[half:])

    class Store(Handler):
        def _answer(self) -> None:
            file = Path(self.note(hub.store))
            content = _as_it_comes(hub, file)
            self.name = file.name
            part = self.headers.get("Range")
            if part is None:
                self.send(content)
                return
            start = int(part.removeprefix("bytes=").partition("-")[0])
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send(content[start:], 206, {"Content-Range": place})

        def write(self, content: bytes) -> None:
            if hub.cuts > 0:
                hub.cuts -= 1
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            else:
                super().write(content)

    servers = [QuietServer(("127.0.0.1", 0), handler) for handler in (Handler, Store)]
    hub.url = f"http://127.0.0.1:{servers[0].server_port}"
    hub.store = f"http://localhost:{servers[1].server_port}"
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _as_it_comes(hub: FakeHub, file: Path) -> bytes:
    content = file.read_bytes()
    if file.name == hub.damaged:
        return content[:-2] + bytes(byte ^ 1 for byte in content[-2:])
    return content[:-2] if file.name == hub.short else content


def _entry(file: Path, root: Path) -> dict:
    content = file.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    entry = {"type": "file", "path": str(file.relative_to(root)), "size": len(content), "oid": git}
    if file.suffix in STORED:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
