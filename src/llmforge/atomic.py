"""Writes files and directories so that a kill at any moment leaves the old state or the new one, never half of one.

Content goes to a temporary sibling (same directory, hence same file system), is flushed to disk and then renamed. Every
room may use this module; it knows nothing of runs and imports nothing but the standard library and the exception tree.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmforge.errors import OutputError

_PARTIAL = ".partial"  # being written: worthless after a kill
_REPLACED = ".replaced"  # the previous good directory, for the moment between two renames
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_BELOW = 1 << 20  # bytes; writers that hide errno (safetensors, torch) fail with less than this left


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file (text as UTF-8) in one step, replacing an older one. The parent directory must exist.

    Raises OutputError when the disk is full, read-only or not writable.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    with _output_errors(path):
        try:
            with open(partial, "xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _flush(path.parent)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `path` when the block ends, and vanishes when it fails.

    An older directory at `path` is replaced as a whole. One writer at a time: what a killed writer left is swept away.
    Its files get the mode that this user's new files have: some writers (safetensors) make them private.
    Raises OutputError when the disk is full, read-only or not writable.
    """
    partial = path.with_name(partial_name(path))
    replaced = path.with_name(f".{path.name}{_REPLACED}")
    with _output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _restore(replaced, path)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        mode = partial.stat().st_mode & 0o666  # the umask has been applied to it, and reading the umask would set it
    try:
        yield partial
        _open_up(partial, mode)
        _flush_tree(partial)
    except BaseException as error:
        failure = _in_words(error, path)  # judged before the cleaning up gives the space back
        shutil.rmtree(partial, ignore_errors=True)
        if failure is not None:
            raise failure from error
        raise
    with _output_errors(path):
        if path.exists():
            os.rename(path, replaced)
        os.rename(partial, path)
        _flush(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def partial_name(path: Path) -> str:
    """Name the sibling in which `atomic_directory` collects what will be `path`, for other processes to write there."""
    return f".{path.name}{_PARTIAL}"


def has_replaced(parent: Path) -> bool:
    """Say whether `restore_replaced` has anything to do in a directory, which need not exist."""
    return any(parent.glob(f".*{_REPLACED}"))


def restore_replaced(parent: Path) -> None:
    """Finish what a kill between the two renames of `atomic_directory` left in `parent`; call before reading there."""
    for replaced in parent.glob(f".*{_REPLACED}"):
        _restore(replaced, parent / replaced.name.removeprefix(".").removesuffix(_REPLACED))


def _restore(replaced: Path, path: Path) -> None:
    if not replaced.exists():
        return
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.rename(replaced, path)


def output_error(error: OSError, path: Path) -> OutputError:
    """Say why `path` cannot be written to and what to change."""
    if error.errno in _FULL:
        return OutputError(_full_message(path))
    if error.errno == errno.EFBIG:
        return OutputError(
            f"a file of {path} is larger than this process may write; raise the limit (ulimit -f). What was there "
            "before is untouched"
        )
    if error.errno == errno.EROFS:
        return OutputError(f"{path} lies on a read-only file system; set output_dir to a place that can be written to")
    if error.errno in (errno.EACCES, errno.EPERM):
        return OutputError(
            f"{path} is not writable for this user; change its permissions or set output_dir to another place"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return OutputError(f"{path} cannot be created: a part of the path is a file; give a place below directories")
    return OutputError(f"{path} cannot be written to ({error.strerror}); set output_dir to another place")


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise output_error(error, path) from error


def _in_words(error: BaseException, path: Path) -> OutputError | None:
    """Recognise a full disk, and a file larger than this process may write, also where a writer hides the errno."""
    if isinstance(error, OSError) and error.errno is not None:
        return output_error(error, path) if error.errno in (*_FULL, errno.EFBIG) else None
    if not isinstance(error, Exception):
        return None
    text = str(error).lower()
    if "file too large" in text:
        return output_error(OSError(errno.EFBIG, ""), path)
    if "no space left" in text or shutil.disk_usage(path.parent).free < _FULL_BELOW:
        return OutputError(_full_message(path))
    return None


def _full_message(path: Path) -> str:
    free = shutil.disk_usage(path.parent).free
    return (
        f"the disk that holds {path.parent} is full ({free / 1e6:,.1f} MB free) and {path.name} could not be written; "
        "free some space or set output_dir to a larger disk. What was there before is untouched"
    )


def _open_up(directory: Path, mode: int) -> None:
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            if not path.is_symlink() and path.stat().st_mode & mode != mode:
                path.chmod(path.stat().st_mode | mode)


def _flush_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            _flush(Path(folder, name))
        _flush(Path(folder))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
