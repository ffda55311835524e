"""Downloads a model's files from a bucket into the cache. The same kinds of files are taken as from the hub."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from llmforge.bucket import BucketDirectory, Entry, copy_to_cache
from llmforge.errors import BucketError, ModelError
from llmforge.models.hub import CODE, UNWANTED, WANTED, WEIGHTS

_PICKLES = "*.bin"


def download_from_bucket(
    url: str,
    *,
    key: str,
    cache_dir: Path,
    code: bool = False,
    pickles: Sequence[str] = (),
    weights: bool = True,
    digest: str | None = None,
) -> Path:
    """Download a model's config, tokenizer and safetensors weights, or its `.gguf` file; return the local copy.

    Files that are there already are kept, and one that was cut goes on where it was.

    Args:
        url: a directory, or a `.gguf` file.
        key: the config key that names it, for errors.
        code: whether the directory's own Python files are wanted.
        pickles: names of pickle files that are wanted.
        weights: whether weights are wanted at all.
        digest: the hash of its files that is expected (`origin_of_copy`).

    Raises:
        ModelError: no credentials, no permission, nothing there, not reached, or no place for the files.
        DownloadInterrupted: ctrl-C.
    """
    try:
        if url.endswith(".gguf"):
            parent, _, name = url.rpartition("/")
            directory = BucketDirectory(parent)
            found = directory.entry(name)
            entries = {} if found is None else {name: found}
            wanted = list(entries)
        else:
            directory = BucketDirectory(url)
            entries = _of_a_model(directory.entries(deep=False))
            small = [*WANTED, *([CODE] if code else [])]
            large = [WEIGHTS, *pickles] if weights else []
            wanted = [name for name in entries if _matches(name, [*small, *large])]
        if not wanted:
            raise ModelError(
                f"{key}: there is no model in {url}; give a directory that holds config.json, tokenizer and "
                "safetensors weights (or an adapter's files), or a .gguf file"
            )
        copy = copy_to_cache(directory, entries, wanted, cache_dir)
    except BucketError as error:
        raise ModelError(f"{key}: {error}") from error
    except OSError as error:
        raise ModelError(
            f"{key}: {url} cannot be stored in the cache {cache_dir} ({error.strerror or type(error).__name__}); free "
            "some space, or set cache_dir to a directory that can be written to"
        ) from error
    if digest is not None and copy.parent.name != digest:
        raise ModelError(f"{key}: the files in {url} have changed since this was trained; restore what they were")
    return copy / name if url.endswith(".gguf") else copy


def _of_a_model(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Give the files that can be part of a model: what else lies beside them does not make it another one."""
    kinds = (*WANTED, CODE, WEIGHTS, _PICKLES)
    return {name: entry for name, entry in entries.items() if _matches(name, kinds)}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns) and not any(fnmatch(name, bad) for bad in UNWANTED)
