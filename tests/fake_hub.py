"""A model hub on the loopback interface, good enough for huggingface_hub to download from. It serves directories."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass(frozen=True)
class Refusal:
    """What the hub answers instead of the model; `files_only` lets everybody see that the model exists."""

    status: int
    code: str = ""
    files_only: bool = False


PRIVATE = Refusal(401, "RepoNotFound")  # also what the hub says of a missing model to somebody it does not know
MISSING = Refusal(404, "RepoNotFound")
NO_REVISION = Refusal(404, "RevisionNotFound")
GATED = Refusal(403, "GatedRepo", files_only=True)
GATED_FOR_STRANGERS = Refusal(401, "GatedRepo", files_only=True)
FORBIDDEN = Refusal(403)
BROKEN = Refusal(500)
NO_HUB = Refusal(200)  # a web site that answers everything, but not as a hub does


@dataclass
class FakeHub:
    """The hub, and what it has been asked: (method, path, Authorization header)."""

    models: Mapping[str, Path | Refusal]
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    @property
    def tokens(self) -> set[str | None]:
        """The Authorization headers that were sent."""
        return {authorization for _, _, authorization in self.requests}


@contextmanager
def fake_hub(models: Mapping[str, Path | Refusal]) -> Iterator[FakeHub]:
    """Serve models by their name, such as `org/tiny`, until the block ends."""
    hub = FakeHub(models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Authorization")))
            is_api = path.startswith("/api/models/")
            is_blob = path.startswith("/blobs/")
            parts = path.removeprefix("/api/models").removeprefix("/blobs").strip("/").split("/")
            model = hub.models.get("/".join(parts[:2]), MISSING)
            if isinstance(model, Refusal):
                if not (model.files_only and is_api):
                    self._refuse(model)
                    return
                files = []
            else:
                files = sorted(file for file in model.rglob("*") if file.is_file())
            if is_api and parts[2] == "tree":
                assert not isinstance(model, Refusal) or model.files_only
                entries = [_entry(file, model) for file in files] or [_file("config.json", 2, "0" * 40)]
                self._send(json.dumps(entries).encode())
            elif is_api:
                names = [{"rfilename": str(file.relative_to(model))} for file in files]
                self._send(json.dumps({"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": names}).encode())
            else:
                assert isinstance(model, Path)
                self._send_file(model / "/".join(parts[2:] if is_blob else parts[4:]), redirect=not is_blob)

        def _send_file(self, file: Path, *, redirect: bool) -> None:
            """Send a small file; of a large one, as the hub does, the address of the store that holds it."""
            if not file.is_file():
                self._refuse(Refusal(404, "EntryNotFound"))
                return
            content = file.read_bytes()
            headers = {"ETag": f'"{_git_hash(content)}"', "X-Repo-Commit": COMMIT}
            if redirect and file.suffix == ".safetensors":
                model, name = urlsplit(self.path).path.split("/resolve/")
                headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
                headers |= {"Location": f"{hub.url}/blobs{model}/{name.partition('/')[2]}"}
                self._send(b"", 302, headers)
            else:
                self._send(content, 200, headers)

        def _refuse(self, refusal: Refusal) -> None:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            self._send(b"<html>no</html>", refusal.status, headers)

        def _send(self, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _entry(file: Path, root: Path) -> dict:
    content = file.read_bytes()
    return _file(str(file.relative_to(root)), len(content), _git_hash(content))


def _file(path: str, size: int, oid: str) -> dict:
    return {"type": "file", "path": path, "size": size, "oid": oid}


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
