"""Finds and opens data files: on disk, in buckets, on hubs. It looks at names and sizes, never at rows."""

import errno
import glob
import gzip
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import fsspec
import pyarrow as pa

from llmforge.bucket import PACKAGES
from llmforge.errors import DataError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
ALLOWED = "JSONL (.jsonl or .json, one object a line, also .gz and .zst) or Parquet (.parquet)"
AHEAD = {"block_size": 8 * 2**20}  # of remote files
BUCKETS = ("s3", "s3a", "gs", "gcs", "hf")  # give any part of a file; of web servers, not all do


def find_files(paths: str | Sequence[str], relative_to: Path) -> list[str]:
    """Return the files that paths, globs and URLs name, in the order given; a glob's matches are sorted.

    A relative path is looked up in `relative_to` (the config's directory), then in the working directory.
    Raises DataError when a path names nothing that can be read, or when a file is named twice.
    """
    given = [paths] if isinstance(paths, str) else list(paths)
    if not given:
        raise DataError(f"an empty list of data files was given; name at least one: {ALLOWED}")
    found: dict[str, str] = {}
    for path in given:
        matches = _find_remote(path) if _is_url(path) else _find_local(path.removeprefix("file://"), relative_to)
        for file in matches:
            if file in found:
                raise DataError(f"given twice, as {found[file]!r} and as {path!r}; name each file once", file=file)
            found[file] = without_secrets(path)
    return list(found)


@contextmanager
def open_file(file: str, *, in_order: bool = True) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed. Raises DataError when it cannot be opened or its compression is broken.

    Without `in_order`, only what is asked for is fetched from a remote file, and nothing ahead.
    """
    if not _is_url(file):
        with _readable(file), open(file, "rb") as stream, _decompressed(file, stream) as content:
            yield content
        return
    with _readable(file):
        file_system, path = fsspec.core.url_to_fs(file)
        with (
            file_system.open(path, "rb", **(AHEAD if in_order else {"cache_type": "none"})) as stream,
            _decompressed(file, stream) as content,
        ):
            yield content


def without_secrets(file: str) -> str:
    """Return a file's name as it may be shown: without the password or the signed query of a URL."""
    if not _is_url(file):
        return file
    scheme, host, path, _, _ = urlsplit(file)
    return urlunsplit((scheme, host.rpartition("@")[2], path, "", ""))


def is_parquet(file: str) -> bool:
    """Tell whether a file that `find_files` found is Parquet; all others are JSONL."""
    return without_secrets(file).lower().endswith(".parquet")


def can_be_cut(file: str) -> bool:
    """Tell whether any part of a file can be read without what is before it: plain JSONL, on disk or in a bucket."""
    plain = without_secrets(file).lower().endswith((".jsonl", ".json"))
    return plain and (is_local(file) or file.partition("://")[0].lower() in BUCKETS)


def is_local(file: str) -> bool:
    """Tell whether a file that `find_files` found is a path, and no URL."""
    return not _is_url(file)


def _is_url(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*:", path, re.IGNORECASE) is not None and "://" in path and path[:7] != "file://"


def _find_local(path: str, relative_to: Path) -> list[str]:
    given = os.path.expanduser(path)
    # join() of an absolute path is that path; a set of one then keeps the message from naming it twice
    candidates = list(dict.fromkeys(os.path.normpath(os.path.join(base, given)) for base in (relative_to, ".")))
    for candidate in candidates:
        with _readable(candidate, missing_is_fine=True):
            size = os.stat(candidate).st_size  # before the glob: a name with [brackets] in it is a name first
            if os.path.isdir(candidate):
                raise DataError(_directory_message(candidate), file=candidate)
            return [_checked(candidate, size)]
    for candidate in candidates:
        matches = [match for match in sorted(glob.glob(candidate, recursive=True)) if not os.path.isdir(match)]
        if matches:
            return [_checked(match, os.stat(match).st_size) for match in matches]
    nothing = "no file matches this glob" if glob.has_magic(given) else "this file does not exist"
    looked = " and ".join(dict.fromkeys(map(os.path.abspath, candidates)))
    raise DataError(f"{nothing} (looked at {looked}); give {ALLOWED}: a path, a glob, a URL, or a list", file=path)


def _find_remote(url: str) -> list[str]:
    shown = without_secrets(url)
    protocol = url.partition("://")[0].lower()
    with _readable(url):
        file_system, path = _file_system(url)
        # In a URL "?" starts a query, so it matches nothing here; and web servers list no directories.
        if re.search(r"[*\[]", path) and protocol not in ("http", "https"):
            matches = [file_system.unstrip_protocol(match) for match in sorted(file_system.glob(path))]
            if not matches:
                raise DataError(f"no file matches this glob; give {ALLOWED}", file=shown)
        else:
            matches = [url]
        for match in matches:
            information = file_system.info(path if match == url else match)
            if information["type"] == "directory":
                raise DataError(_directory_message(shown), file=shown)
            _checked(match, information.get("size"))
        return matches


def _file_system(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0].lower()
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        install = f"run `pip install '{package}'`" if package else str(error)
        raise DataError(
            f"{protocol}:// needs a package that is not installed; {install}", file=without_secrets(url)
        ) from None
    except ValueError:
        known = "s3://, gs://, https://, hf://datasets/…"
        raise DataError(
            f"{protocol}:// is not a known kind of URL; give {known}, or a path", file=without_secrets(url)
        ) from None


def _checked(file: str, size: int | None) -> str:
    """Return `file` if its name and size (bytes; None where a server does not say) can be those of a data file."""
    shown = without_secrets(file)
    if not shown.lower().endswith(SUFFIXES):
        ending = os.path.splitext(shown)[1]
        raise DataError(f"its ending {ending!r} is not one that llmforge reads; give {ALLOWED}", file=shown)
    if size == 0:
        raise DataError("this file is empty, expected one example a line", file=shown)
    if not _is_url(file):
        with _readable(file), open(file, "rb"):
            pass
    return file


def _directory_message(directory: str) -> str:
    directory = directory.rstrip("/")
    return f"this is a directory; name its files, or a glob such as {directory}/*.jsonl or {directory}/**/*.parquet"


@contextmanager
def _readable(file: str, missing_is_fine: bool = False) -> Iterator[None]:
    """Turn what goes wrong with a file into a DataError that names it."""
    shown = without_secrets(file)
    try:
        yield
    except DataError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        # fsspec says "not found" of every web server that does not give the file, and keeps the answer as the cause.
        answer = error.__cause__ if file.lower().startswith("http") else None
        if answer is not None and not str(answer).startswith("404"):
            raise DataError(f"cannot be read: {_text(answer, file)}", file=shown) from None
        if not missing_is_fine:
            raise DataError(f"this file does not exist; give {ALLOWED}", file=shown) from None
    except PermissionError:
        change = "check your credentials" if _is_url(file) else f"`ls -l {file}` shows who may"
        raise DataError(f"no permission to read this file; {change}", file=shown) from None
    except (gzip.BadGzipFile, EOFError, pa.ArrowInvalid) as error:
        raise DataError(f"damaged or cut short ({error}); make or download it again", file=shown) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG and missing_is_fine:
            return
        raise DataError(f"cannot be read: {_text(error, file)}", file=shown) from None
    except Exception as error:
        # Buckets and hubs raise errors of their own (no credentials, connection refused, 403, 404).
        if not _is_url(file):
            raise
        raise DataError(f"cannot be read: {_text(error, file)}", file=shown) from None


def _text(error: BaseException, file: str) -> str:
    """Return an error's kind and text; only its kind where the text repeats a secret of the file's URL."""
    kind = type(error).__name__
    if not _is_url(file):
        return f"{kind}: {error}"
    text = unquote(re.sub(r"\w+://[^\s'\"]+", without_secrets(file), str(error)))
    parts = urlsplit(file)
    secrets = [parts.username, parts.password, *(value for _, value in parse_qsl(parts.query))]
    return kind if any(secret and unquote(secret) in text for secret in secrets) else f"{kind}: {text}"


@contextmanager
def _decompressed(file: str, stream: IO[bytes]) -> Iterator[IO[bytes]]:
    name = without_secrets(file).lower()
    if name.endswith(".gz"):
        with gzip.open(stream) as content:
            yield cast(IO[bytes], content)
    elif name.endswith(".zst"):
        with pa.CompressedInputStream(pa.PythonFile(stream), "zstd") as content:
            yield content
    else:
        yield stream
