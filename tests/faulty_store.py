"""Stores on the loopback interface, and a proxy in front of them that fails as real ones do.

For `s3://` it is moto's server, for `gs://` that of gcp-storage-emulator.
"""

import hashlib
import http.client
import itertools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote

BUCKET = "bucket"
SLOW_DOWN = (503, "SlowDown", "Please reduce your request rate.")
BROKEN = (500, "InternalError", "We encountered an internal error. Please try again.")
FORBIDDEN = (403, "AccessDenied", "Access Denied")
CUT = "cut"  # the connection is closed without an answer
LATE = 0.2  # any number: the answer comes after so many seconds
DAMAGED = "damaged"  # what is written is another content


class Request(NamedTuple):
    """What the store was asked; `part` is the Range header, `key` the file it is about, if it is about one."""

    method: str
    path: str
    part: str | None
    key: str

    @property
    def changes(self) -> bool:
        """Whether it writes or deletes."""
        return self.method in ("PUT", "POST", "DELETE")


Fault = tuple[int, str, str] | str | float | None


class QuietServer(ThreadingHTTPServer):
    """Says nothing of clients that have left: a test may be reading what this process writes to stderr."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Server(Protocol):
    """A store without faults."""

    address: tuple[str, int]

    def names(self, prefix: str) -> list[str]: ...
    def get(self, key: str) -> bytes: ...
    def put(self, key: str, content: bytes) -> None: ...
    def delete(self, key: str) -> None: ...
    def stop(self) -> None: ...


class S3:
    """moto's server."""

    def __init__(self) -> None:
        import botocore.session
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.address = self._server.get_host_and_port()
        self.stop = self._server.stop
        self._client = botocore.session.Session().create_client(
            "s3",
            endpoint_url="http://{}:{}".format(*self.address),
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        self._client.create_bucket(Bucket=BUCKET)

    def names(self, prefix: str) -> list[str]:
        return [item["Key"] for item in self._client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]

    def get(self, key: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def put(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=key)


class GoogleStorage:
    """gcp-storage-emulator's server."""

    def __init__(self) -> None:
        from gcp_storage_emulator.server import create_server

        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = free.getsockname()
        self._server = create_server(*self.address, in_memory=True, default_bucket=BUCKET)
        self._server.start()
        self.stop = self._server.stop

    def names(self, prefix: str) -> list[str]:
        found = json.loads(self._ask("GET", f"/storage/v1/b/{BUCKET}/o?prefix={quote(prefix, safe='')}"))
        return [item["name"] for item in found.get("items", [])]

    def get(self, key: str) -> bytes:
        return self._ask("GET", f"/storage/v1/b/{BUCKET}/o/{quote(key, safe='')}?alt=media")

    def put(self, key: str, content: bytes) -> None:
        self._ask("POST", f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(key, safe='')}", content)

    def delete(self, key: str) -> None:
        self._ask("DELETE", f"/storage/v1/b/{BUCKET}/o/{quote(key, safe='')}")

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        status, _, content = ask(self.address, method, path, body, {"Content-Type": "application/octet-stream"})
        assert status < 300, (method, path, status, content)
        return content


STORES: dict[str, Callable[[], Server]] = {"s3": S3, "gs": GoogleStorage}


@dataclass
class FaultyStore:
    """The store: its address, what it was asked, and what goes wrong with a request (nothing by default)."""

    scheme: str
    server: Server
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[Request], Fault] = lambda request: None
    encrypts: bool = False  # S3 with keys of its own: then ETags are hashes of nothing that we know

    @property
    def bucket(self) -> str:
        """The URL of its bucket."""
        return f"{self.scheme}://{BUCKET}"

    def tree(self, prefix: str) -> dict[str, bytes]:
        """Read all files below a prefix, past the proxy."""
        return {name.removeprefix(f"{prefix}/"): self.get(name) for name in self.server.names(f"{prefix}/")}

    def get(self, key: str) -> bytes:
        return self.server.get(key)

    def put(self, key: str, content: bytes) -> None:
        self.server.put(key, content)

    def delete(self, prefix: str) -> None:
        for name in self.server.names(f"{prefix}/"):
            self.server.delete(name)


def one_in(count: int, *faults: Fault) -> Callable[[Request], Fault]:
    """Let one request in `count` fail, in each of the ways in turn."""
    numbers, ways = itertools.count(1), itertools.cycle(faults)
    return lambda request: next(ways) if next(numbers) % count == 0 else None


def down_after(changes: int) -> Callable[[Request], Fault]:
    """Let everything fail from one changing request on, as for a program that is killed there."""
    left = [changes]

    def fault(request: Request) -> Fault:
        if left[0] > 0 and request.changes:
            left[0] -= 1
            return None
        return CUT if left[0] <= 0 else None

    return fault


def ask(
    address: tuple[str, int], method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Make one request, and give status, headers and content of the answer."""
    connection = http.client.HTTPConnection(*address, timeout=30)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.getheaders(), response.read()
    finally:
        connection.close()


@contextmanager
def faulty_store(scheme: str = "s3") -> Iterator[FaultyStore]:
    """Serve an empty bucket called `bucket` until the block ends."""
    store = FaultyStore(scheme, STORES[scheme]())

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            key = _key(self.path, body)
            request = Request(self.command, self.path, self.headers.get("Range"), key)
            store.requests.append(request)
            fault = store.fault(request)
            if fault == CUT:
                self.close_connection = True
                return
            if isinstance(fault, float):
                time.sleep(fault)
            if isinstance(fault, tuple):
                self.refuse(*fault)
                return
            if fault == DAMAGED:
                body = damaged(body, scheme)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            status, answered, content = ask(store.server.address, self.command, self.path, body, headers)
            hidden = ("connection", "transfer-encoding", "date", "server")
            given = {name: value for name, value in answered if name.lower() not in hidden}
            if store.encrypts:
                given = {name: _other(value) if name.lower() == "etag" else value for name, value in given.items()}
                content = re.sub(rb"(?<=<ETag>).*?(?=</ETag>)", lambda tag: _other(tag[0].decode()).encode(), content)
                given.pop("Content-Length", None) if self.command != "HEAD" else None
            self.send(status, given, content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def refuse(self, status: int, code: str, message: str) -> None:
            if scheme == "s3":
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
                self.send(status, {"Content-Type": "application/xml"}, text.encode())
            else:
                error = json.dumps({"error": {"code": status, "message": message}})
                self.send(status, {"Content-Type": "application/json"}, error.encode())

        def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
            with suppress(OSError):  # the one who asked may have been killed
                self.send_response(status)
                if not any(name.lower() == "content-length" for name in headers):
                    headers = {**headers, "Content-Length": str(len(content))}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    proxy = QuietServer(("127.0.0.1", 0), Proxy)
    proxy.daemon_threads = True
    store.url = f"http://127.0.0.1:{proxy.server_port}"
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
        store.server.stop()


def damaged(body: bytes, scheme: str) -> bytes:
    """Change the first byte of a file that is written: to Google's stores it comes behind headers and a description."""
    place = 0 if scheme == "s3" else body.index(b"\n\n", body.index(b"\n\n") + 2) + 2
    return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]


def _key(path: str, body: bytes) -> str:
    """Find which file a request is about; Google's stores are told of it in the path, in the query or in the body."""
    place, _, query = path.partition("?")
    found = re.search(r"/o/(.+)", place) or re.search(r"(?:^|&)name=([^&]+)", query)
    if found is None and place.endswith("/o"):
        named = re.search(rb'"name": "([^"]+)"', body[:1000])
        return named[1].decode() if named else ""
    return unquote(found[1] if found else place.removeprefix(f"/{BUCKET}").lstrip("/"))


def _other(tag: str) -> str:
    digits = re.search(r"[0-9a-f]{32}", tag)
    return tag if digits is None else tag.replace(digits[0], hashlib.md5(digits[0].encode()).hexdigest())


def credentials(store: FaultyStore, cache: os.PathLike[str]) -> dict[str, str]:
    """Give the environment in which URLs mean the store, and nothing is written to this user's directories."""
    if store.scheme == "s3":
        keys = {
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
    else:
        keys = {"STORAGE_EMULATOR_HOST": store.url, "NO_GCE_CHECK": "true", "CLOUDSDK_CONFIG": os.devnull}
    return {**keys, "XDG_CACHE_HOME": os.fspath(cache)}
