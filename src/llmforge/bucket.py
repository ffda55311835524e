"""Reads and writes directories in buckets (`s3://`, `gs://`), verifies uploads, and continues downloads that were cut.

fsspec speaks to the stores, with the credentials that their own tools use. What fails for a moment (errors, throttling,
lost connections) is tried again, each time after a longer wait. This module knows no runs and no models; what a
directory means, and in which order its files have to appear, is for those who use it.
"""

import base64
import contextlib
import errno
import fcntl
import hashlib
import inspect
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llmforge.errors import BucketError, DownloadInterrupted

# fsspec protocol → what to install when its package is missing
PACKAGES = {
    "s3": "llmforge[s3]",
    "s3a": "llmforge[s3]",
    "gs": "llmforge[gcs]",
    "gcs": "llmforge[gcs]",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (AWS_ENDPOINT_URL for a store other than "
    "AWS's)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run `gcloud auth application-default login`",
}
ATTEMPTS = 7
FIRST_WAIT = 0.5  # seconds; the next ones are twice as long each, give or take a half
SECONDS_TO_CONNECT = 10
SECONDS_TO_ANSWER = 60
PATIENCE = 120.0  # seconds after which a request that fails is not tried again
PART_BYTES = 32 << 20  # of an upload; a file of two and more is uploaded in parts
PIECE_BYTES = 8 << 20  # of a download: what is lost when it is cut
AT_ONCE = 4  # files downloaded, or parts uploaded, at the same time
UPLOADS = 3  # of a file that arrives as another one

# gcsfs would ask, by gRPC, of which kind a bucket is before it reads or writes there, and wait a minute where nothing
# answers that. It is asked for plain objects only. It reads this when it is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

_URL = re.compile(r"(s3|gs):/{1,2}([^/].*)")  # one slash is left where a URL went through pathlib
_MD5 = re.compile(r"[0-9a-f]{32}")
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
}
# What a store refuses for good, unless it is one of these, which mean that a request was damaged on its way.
_REFUSED = {errno.EINVAL, errno.ENOSYS, errno.EPERM, getattr(errno, "EREMCHG", errno.EINVAL)}
_DAMAGED = {"BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentSHA256Mismatch"}
_JITTER = random.SystemRandom()  # the other generators belong to the training

T = TypeVar("T")


def bucket_url(place: str | Path) -> str | None:
    """Give the URL of a place in a bucket, without a slash at its end; None for every other place."""
    match = _URL.fullmatch(str(place))
    return None if match is None else f"{match[1]}://{match[2].rstrip('/')}"


def local_parts(url: str) -> tuple[str, ...]:
    """Give the parts of a local path that stands for a URL: its scheme, bucket and directories.

    Raises BucketError where a part could lead elsewhere.
    """
    scheme, _, rest = url.partition("://")
    names = rest.split("/")
    if any(name in ("", ".", "..") or "\0" in name for name in names):
        raise BucketError(
            f"{url} has a part that is empty or made of dots; give a place such as {scheme}://bucket/runs"
        )
    return scheme, *names


def url_of_parts(parts: Iterable[str]) -> str:
    """Give the URL that `local_parts` made a path's parts of."""
    scheme, *names = parts
    return f"{scheme}://{'/'.join(names)}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a bucket: its size in bytes, and what the store calls its content (an MD5 where it tells one)."""

    size: int
    tag: str


class BucketDirectory:
    """A directory in a bucket. Names of files are relative to it, with slashes.

    Everything raises BucketError when the store refuses, or fails again and again; OSError is left for the local disk.
    """

    def __init__(self, url: str) -> None:
        found = bucket_url(url)
        assert found is not None, url
        self.url = found
        self.attempts = ATTEMPTS
        self._scheme = found.partition("://")[0]
        self._opened: Any = None
        self._opening = threading.Lock()
        self._tags_tell: bool | None = (
            None  # whether its tags are MD5s; not where a store encrypts with keys of its own
        )

    def entries(self, *, deep: bool = True) -> dict[str, Entry]:
        """List the files of the directory, with those below it if `deep`. A directory that is not there has none."""
        top = self._key("")
        files = self._files
        try:
            found = (
                self._try(lambda: files.find(top, detail=True))
                if deep
                else {item["name"]: item for item in self._try(lambda: files.ls(top, detail=True))}
            )
        except BucketError as error:
            if isinstance(error.__cause__, FileNotFoundError) and self._bucket_exists():
                return {}
            raise
        return {
            name[len(top) + 1 :]: self._entry(item)
            for name, item in found.items()
            if item["type"] == "file" and name.startswith(f"{top}/") and not name.endswith("/")
        }

    def entry(self, name: str) -> Entry | None:
        """Describe one file; None where there is none."""
        try:
            found = self._try(lambda: self._files.info(self._key(name)), name)
        except BucketError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return self._entry(found) if found["type"] == "file" else None

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Read a file, or the bytes of it from `start` up to `end`."""
        if end is None:
            return self._try(lambda: self._files.cat_file(self._key(name)), name)
        return (
            b""
            if start >= end
            else self._try(lambda: self._files.cat_file(self._key(name), start=start, end=end), name)
        )

    def check_writable(self) -> None:
        """Write a small file into the directory and delete it."""
        name = f".{os.urandom(4).hex()}.probe"
        try:
            self._try(lambda: self._files.pipe_file(self._key(name), b"0"))
        except BucketError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise BucketError(f"there is no bucket {self._bucket}; make it, or give another place") from error
            raise
        self.delete([name])

    def holds(self, name: str, there: Entry | None, path: Path) -> bool:
        """Say whether a file in the bucket has the content of a local one; it is read where its tag does not tell."""
        if there is None or there.size != path.stat().st_size:
            return False
        if there.tag == self._tag(path):
            self._tags_tell = True
            return True
        if self._tags_tell and _MD5.fullmatch(there.tag):
            return False
        if not self._reads_as(name, path):
            return False
        self._tags_tell = False
        return True

    def upload(self, path: Path, name: str) -> Entry:
        """Write a local file to the bucket, and check that it came there as it is here.

        Where the store's tags are no hashes of the content, its size is all that is compared.
        """
        for _ in range(UPLOADS):
            self._try(lambda: self._files.put_file(str(path), self._key(name), chunksize=PART_BYTES), name)
            there = self.entry(name)
            if there is None or there.size != path.stat().st_size:
                continue
            if self._tags_tell is False or self.holds(name, there, path):
                return there
        raise BucketError(f"{self.url}/{name} was uploaded {UPLOADS} times and is another file there than here")

    def download(self, name: str, entry: Entry, path: Path, stop: threading.Event | None = None) -> None:
        """Fetch a file to `path`, complete or not at all; a try that was cut is continued.

        Where `stop` is set meanwhile, it ends early and leaves what it has to the next try.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        version = hashlib.blake2b(f"{entry.size} {entry.tag}".encode(), digest_size=6).hexdigest()
        unfinished = path.with_name(f".{path.name}.{version}.partial")
        while not self._continue(name, entry, unfinished, path, stop):
            if path.is_file() and path.stat().st_size == entry.size:
                return

    def _continue(self, name: str, entry: Entry, unfinished: Path, path: Path, stop: threading.Event | None) -> bool:
        """Append what an unfinished file lacks; return False where another run had it, and has finished it or given up.

        The lock belongs to the file and not to its name, which another run may have given to `path` meanwhile.
        """
        with open(unfinished, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if not os.path.samestat(os.fstat(file.fileno()), unfinished.stat()):
                    return False
            except FileNotFoundError:
                return False
            file.seek(0, os.SEEK_END)  # another run may have written since it was opened
            while (start := file.tell()) < entry.size:
                if stop is not None and stop.is_set():
                    return True
                piece = self.read(name, start, min(start + PIECE_BYTES, entry.size))
                if not piece:
                    break
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            if file.tell() != entry.size or self.entry(name) != entry:
                unfinished.unlink()
                raise BucketError(f"{self.url}/{name} was changed while it was downloaded; run again")
            os.replace(unfinished, path)
            return True

    def download_all(self, entries: Mapping[str, Entry], directory: Path) -> None:
        """Fetch files into a local directory, several at once.

        Raises DownloadInterrupted at ctrl-C; what is complete is kept.
        """
        stop = threading.Event()
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            started = [
                pool.submit(self.download, name, entry, directory / name, stop) for name, entry in entries.items()
            ]
            for download in started:
                download.result()
        except KeyboardInterrupt:
            raise DownloadInterrupted("interrupted; files that are complete are kept") from None
        finally:
            stop.set()  # each thread ends with the piece that it is at
            pool.shutdown(wait=False, cancel_futures=True)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, in the order given; those that are gone already are no error."""
        for name in names:
            try:
                self._try(partial(self._files.rm_file, self._key(name)), name)
            except BucketError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise

    @contextlib.contextmanager
    def trying(self, attempts: int) -> Iterator[None]:
        """Try each request only so often inside the block, and no more often those that are at it already."""
        before, self.attempts = self.attempts, attempts
        try:
            yield
        finally:
            self.attempts = before

    @property
    def _bucket(self) -> str:
        return "/".join(self.url.split("/")[:3])

    @property
    def _files(self) -> Any:
        """The file system of fsspec, opened when it is first needed."""
        with self._opening:
            if self._opened is None:
                try:
                    self._opened = _file_system(self._scheme)
                except ImportError:
                    raise BucketError(
                        f"{self._scheme}:// needs a package that is not installed; run `pip install "
                        f"'{PACKAGES[self._scheme]}'`"
                    ) from None
            return self._opened

    def _key(self, name: str) -> str:
        path = self.url.partition("://")[2]
        return f"{path}/{name}" if name else path

    def _bucket_exists(self) -> bool:
        bucket = self._bucket.partition("://")[2]
        try:
            self._try(lambda: self._files.ls(bucket, detail=True))
        except BucketError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise BucketError(f"there is no bucket {self._bucket}; check its name") from error
            raise
        return True

    def _entry(self, item: Mapping[str, Any]) -> Entry:
        if "md5Hash" in item:
            return Entry(item["size"], base64.b64decode(item["md5Hash"]).hex())
        tag = item.get("ETag") or item.get("crc32c") or item.get("etag") or ""
        return Entry(item["size"], str(tag).strip('"'))

    def _tag(self, path: Path) -> str:
        """Compute what the store will call a file that we upload: its MD5, on S3 of a large file that of its parts'."""
        size = path.stat().st_size
        in_parts = self._scheme == "s3" and size >= 2 * PART_BYTES
        digests = []
        with path.open("rb") as file:
            while True:
                digest = hashlib.md5(usedforsecurity=False)
                left = PART_BYTES if in_parts else size
                while left > 0 and (piece := file.read(min(left, 1 << 20))):
                    digest.update(piece)
                    left -= len(piece)
                digests.append(digest)
                if not in_parts or file.tell() >= size:
                    break
        if not in_parts:
            return digests[0].hexdigest()
        joined = hashlib.md5(b"".join(digest.digest() for digest in digests), usedforsecurity=False)
        return f"{joined.hexdigest()}-{len(digests)}"

    def _reads_as(self, name: str, path: Path) -> bool:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                if self.read(name, file.tell() - len(piece), file.tell()) != piece:
                    return False
        return True

    def _try(self, call: Callable[[], T], name: str = "") -> T:
        """Make a request, again and again where that may help."""
        place = f"{self.url}/{name}" if name else self.url
        began = time.monotonic()
        attempt = 0
        while True:
            attempt += 1
            try:
                return call()
            except BucketError:
                raise
            except Exception as error:
                refusal = self._refusal(error)
                if refusal is not None:
                    raise BucketError(f"{place}: {refusal}") from error
                if attempt >= self.attempts or time.monotonic() - began > PATIENCE:
                    tries = f", also at try {attempt}" if attempt > 1 else ""
                    raise BucketError(f"{place} cannot be had{tries} ({_text(error)})") from error
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1) * _JITTER.uniform(0.5, 1.5))

    def _refusal(self, error: Exception) -> str | None:
        """Say why a request must fail again, and what to change; None where it need not."""
        if type(error).__name__ in _NO_CREDENTIALS:
            return f"no credentials were found ({_text(error)}); {CREDENTIALS[self._scheme]}"
        if isinstance(error, FileNotFoundError):
            return f"it does not exist ({_text(error)})"
        code = getattr(error, "code", None)  # of gcsfs
        if code in (401, "401") and "Invalid Credentials" in str(error):
            return None  # a token that has just run out; the next request gets another one
        if isinstance(error, PermissionError) or str(error).startswith("Forbidden") or code in (401, 403, "401", "403"):
            return f"no permission ({_text(error)}); use credentials that have it: {CREDENTIALS[self._scheme]}"
        if isinstance(error, OSError) and error.errno in _REFUSED:
            response = getattr(error.__cause__, "response", None) or {}
            return None if response.get("Error", {}).get("Code") in _DAMAGED else _text(error)
        invalid = isinstance(error, ValueError | TypeError | LookupError | AttributeError)
        if invalid or code in (400, "400") or type(error).__name__ == "ParamValidationError":
            return _text(error)
        return None


def copy_to_cache(
    directory: BucketDirectory, entries: Mapping[str, Entry], wanted: Iterable[str], cache_dir: Path
) -> Path:
    """Give a local copy of files in a bucket, downloading what it lacks.

    The copy's path is made of the URL and of a hash of `entries`. So it is never one of older files, a download that
    was cut goes on, and the path tells where its files came from (`origin_of_copy`).

    Args:
        entries: what the copy stands for.
        wanted: which of them are needed now.

    Raises:
        BucketError: something cannot be downloaded.
        OSError: there is no place for it on this disk.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, entry in sorted(entries.items()):
        digest.update(f"{name}\0{entry.size}\0{entry.tag}\n".encode())
    *parents, last = local_parts(directory.url)
    copy = cache_dir.joinpath("buckets", *parents, digest.hexdigest(), last)
    for name in entries:
        if not (copy / name).resolve().is_relative_to(copy.resolve()):
            raise BucketError(f"{directory.url}/{name} would be written outside its directory; rename it")
    missing = {
        name: entries[name]
        for name in wanted
        if not (copy / name).is_file() or (copy / name).stat().st_size != entries[name].size
    }
    copy.mkdir(parents=True, exist_ok=True)
    directory.download_all(missing, copy)
    return copy


def origin_of_copy(path: Path) -> tuple[str, str] | None:
    """Give the URL that a path of `copy_to_cache` stands for, on any machine, and the hash of its files."""
    parts = path.parts
    for place, part in enumerate(parts[:-3]):
        scheme, *names, digest, last = parts[place + 1 :]
        if part == "buckets" and scheme in CREDENTIALS and _MD5.fullmatch(digest):
            return url_of_parts((scheme, *names, last)), digest
    return None


def _file_system(scheme: str) -> Any:
    """Open fsspec's file system for s3:// or gs://. Raises ImportError where its package is missing.

    Trying again is our business: several layers that do it multiply the time until an outage is told.
    """
    import fsspec

    if scheme == "s3":
        opened = fsspec.filesystem(
            "s3",
            use_listings_cache=False,
            config_kwargs={
                "retries": {"total_max_attempts": 1},
                "connect_timeout": SECONDS_TO_CONNECT,
                "read_timeout": SECONDS_TO_ANSWER,
            },
            max_concurrency=AT_ONCE,
        )
        opened.retries = 1
        return opened
    from aiohttp import ClientTimeout

    patience = ClientTimeout(sock_connect=SECONDS_TO_CONNECT, sock_read=SECONDS_TO_ANSWER)  # it has none of its own
    opened = fsspec.filesystem("gs", use_listings_cache=False, requests_timeout=patience)
    opened._request = partial(inspect.unwrap(type(opened)._request), opened)  # without what tries six times
    return opened


def _text(error: BaseException) -> str:
    """Give an error's kind and text in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
