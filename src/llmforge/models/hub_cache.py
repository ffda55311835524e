"""Keeps the hub cache sound: continues weight files that were cut, and checks what came against the hub's hashes.

In the cache a file's content lies in `blobs`, under the ETag that the hub announced for it, which is a hash of it;
snapshots link to it. huggingface_hub compares lengths only. It writes each try to a file with a name of its own, which
no later try continues and which stays behind where the program was killed.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from llmforge.errors import ModelError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_STALE_SECONDS = 3600  # a download that is alive writes every few seconds
_AT_ONCE = 8  # as many files as huggingface_hub downloads at once


def repository(repo_id: str) -> Path:
    """Give the directory that a repository has in the hub cache, whether or not it exists."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / repo_folder_name(repo_id=repo_id, repo_type="model")


def fetch_weights(repo_id: str, snapshot: Path, names: Sequence[str], *, key: str) -> None:
    """Download weight files into the cache's blobs, each from where an earlier try was cut.

    Left to huggingface_hub are files whose ETag is no SHA-256, and those in Xet storage, of which it fetches many
    pieces at once.

    Raises:
        ModelError: a connection was lost, or what came is not what the hub announced.
    """
    missing = [name for name in names if not (snapshot / name).exists()]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: _fetch(repo_id, snapshot.name, name, key), missing))


def _fetch(repo_id: str, commit: str, name: str, key: str) -> None:
    import httpx2
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined] # exported lazily

    url = hf_hub_url(repo_id, name, revision=commit)
    announced = get_hf_file_metadata(url)
    from_xet = announced.xet_file_data is not None and not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet")
    if from_xet or not _SHA256.fullmatch(announced.etag or ""):
        return
    home = repository(repo_id)
    blob = home / "blobs" / str(announced.etag)
    partial = blob.with_name(f"{blob.name}.incomplete")
    lock = home.parent / ".locks" / home.name / f"{blob.name}.lock"  # the one that huggingface_hub takes
    lock.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        try:
            with partial.open("ab") as file:
                http_get(
                    url,  # not of the store it leads to: the client keeps the token from other hosts
                    file,
                    resume_size=file.tell(),
                    expected_size=announced.size,
                    displayed_filename=name,
                    headers=build_hf_headers(headers={"Accept-Encoding": "identity"}),
                )
        except httpx2.TransportError as error:
            raise ModelError(
                f"{key}: the connection was lost while {name} of {repo_id} was downloaded; run again to go on"
            ) from error
        except HfHubHTTPError:
            raise
        except OSError as error:
            if error.errno is None:  # not of the file system: the length is wrong
                partial.unlink()
                raise ModelError(f"{key}: {wrong_length(f'{name} of {repo_id}')}") from error
            raise
        if not _has_hash(partial, blob.name):
            partial.unlink()
            raise ModelError(f"{key}: {_wrong_content(name, repo_id)}")
        partial.replace(blob)


@contextmanager
def new_blobs_checked(repo_id: str, *, key: str) -> Iterator[None]:
    """Compare the blobs that come into the cache with the hashes they are named after; delete those that differ.

    Blobs that were there before are not read again: they can be gigabytes.

    Raises:
        ModelError: a blob differs; says of which file.
    """
    home = repository(repo_id)
    before = {blob.name for blob in home.glob("blobs/*")}
    try:
        yield
    finally:  # also of a download that failed, since the next one takes what is there as checked
        damaged = []
        for blob in home.glob("blobs/*"):
            if blob.name in before or blob.is_symlink() or _has_hash(blob, blob.name):
                continue
            links = [path for path in home.glob("snapshots/*/**/*") if path.is_symlink() and path.resolve() == blob]
            for path in (*links, blob):
                path.unlink()
            damaged += [link.name for link in links[:1]]
        if damaged:
            raise ModelError(f"{key}: {_wrong_content(', '.join(sorted(damaged)), repo_id)}")


def remove_stale(repo_id: str) -> None:
    """Remove files of downloads that were killed and that nothing can continue."""
    for path in repository(repo_id).glob("blobs/*.*.incomplete"):
        with suppress(OSError):  # gone meanwhile, or a cache that may only be read
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def wrong_length(files: str) -> str:
    """Say that something came with another length than announced."""
    return f"{files} came with another length than the hub announced; run again, and files that are whole are kept"


def _wrong_content(names: str, repo_id: str) -> str:
    return (
        f"{names} of {repo_id} came with another content than the hub announced (the hash differs) and was deleted; "
        "run again, and files that are whole are kept"
    )


def _has_hash(path: Path, name: str) -> bool:
    """Say whether a file's content has the hash it is named after; True where the name is of a kind we do not know."""
    if not path.is_file():
        return True
    size = path.stat().st_size
    if _SHA256.fullmatch(name):
        hashes = [hashlib.sha256()]
    elif _SHA1.fullmatch(name):  # git's way on the hub; some mirrors give that of the content alone
        hashes = [hashlib.sha1(start, usedforsecurity=False) for start in (b"blob %d\0" % size, b"")]
    else:
        return True
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            for digest in hashes:
                digest.update(piece)
    return any(digest.hexdigest() == name for digest in hashes)
