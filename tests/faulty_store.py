"""An S3 server on the loopback interface (moto's), and a proxy in front of it that fails as real stores do."""

import hashlib
import http.client
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

BUCKET = "bucket"
SLOW_DOWN = (503, "SlowDown", "Please reduce your request rate.")
BROKEN = (500, "InternalError", "We encountered an internal error. Please try again.")
FORBIDDEN = (403, "AccessDenied", "Access Denied")
CUT = "cut"  # the connection is closed without an answer
LATE = "late"  # the answer comes after a while
DAMAGED = "damaged"  # what is written is another content


class Request(NamedTuple):
    """What the store was asked; `part` is the Range header."""

    method: str
    path: str
    part: str | None

    @property
    def changes(self) -> bool:
        """Whether it writes or deletes."""
        return self.method in ("PUT", "POST", "DELETE")


Fault = tuple[int, str, str] | str | None


@dataclass
class FaultyStore:
    """The store: its address, what it was asked, and what goes wrong with a request (nothing by default)."""

    client: Any = None
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[Request], Fault] = lambda request: None
    encrypts: bool = False  # with keys of its own: then ETags are hashes of nothing that we know

    def tree(self, prefix: str) -> dict[str, bytes]:
        """Read all files below a prefix, past the proxy."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
        return {item["Key"].removeprefix(f"{prefix}/"): self.get(item["Key"]) for item in found}

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def delete(self, prefix: str) -> None:
        for name in self.tree(prefix):
            self.client.delete_object(Bucket=BUCKET, Key=f"{prefix}/{name}")


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


@contextmanager
def faulty_store() -> Iterator[FaultyStore]:
    """Serve an empty bucket called `bucket` until the block ends."""
    import botocore.session
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    client.create_bucket(Bucket=BUCKET)
    store = FaultyStore(client)

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(self.command, self.path, self.headers.get("Range"))
            store.requests.append(request)
            fault = store.fault(request)
            if fault == CUT:
                self.close_connection = True
                return
            if fault == LATE:
                time.sleep(0.2)
            if isinstance(fault, tuple):
                status, code, message = fault
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
                self.send(status, {"Content-Type": "application/xml"}, text.encode())
                return
            if fault == DAMAGED:
                body = bytes(byte ^ 1 for byte in body)
            connection = http.client.HTTPConnection(host, port, timeout=30)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "expect")}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            hidden = ("connection", "transfer-encoding", "date", "server")
            given = {name: value for name, value in response.getheaders() if name.lower() not in hidden}
            if store.encrypts:
                given = {name: _other(value) if name.lower() == "etag" else value for name, value in given.items()}
                content = re.sub(rb"(?<=<ETag>).*?(?=</ETag>)", lambda tag: _other(tag[0].decode()).encode(), content)
                given.pop("Content-Length", None) if self.command != "HEAD" else None
            self.send(response.status, given, content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

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

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
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
        server.stop()


def _other(tag: str) -> str:
    digits = re.search(r"[0-9a-f]{32}", tag)
    return tag if digits is None else tag.replace(digits[0], hashlib.md5(digits[0].encode()).hexdigest())


def credentials(store: FaultyStore, cache: os.PathLike[str]) -> dict[str, str]:
    """Give the environment in which s3:// means the store, and nothing is written to this user's directories."""
    return {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "XDG_CACHE_HOME": os.fspath(cache),
    }
