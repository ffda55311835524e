"""The directory of one run: where each of its files lies, whether there is a place and room for them, and who has it.

It knows names and space, not contents: who writes a file decides what is in it.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmforge.atomic import has_replaced, output_error, restore_replaced
from llmforge.errors import InputError, OutputError

_CONFIG, _MANIFEST, _LOCK, _ROWS = "config.yaml", "manifest.json", "run.lock", "rows.jsonl"
_BEGINNING = {_MANIFEST, _CONFIG, _LOCK, _ROWS}  # before there is anything to continue; the manifest comes first
_HALF_WRITTEN = (".partial", ".tmp", ".probe")
_LONGEST_NAME = 200  # bytes; file systems allow 255, and temporary siblings need some of them
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The layout of `<output_dir>/<tag>/`."""

    path: Path

    @classmethod
    def at(cls, output_dir: Path, tag: str) -> "RunDirectory":
        """Say where a run of this tag lies, without making or checking anything."""
        return cls(output_dir / safe_name(tag))

    @staticmethod
    def check(output_dir: Path, tag: str | None) -> None:
        """Find out, at no cost and leaving nothing, whether a run (of this tag, where it is known) has a place here.

        Raises OutputError when the place cannot be written to or holds another run, InputError for an unusable tag.
        """
        path = output_dir if tag is None else output_dir / safe_name(tag)
        existing = _nearest_directory(path)
        effective = os.access in os.supports_effective_ids
        if not os.access(existing, os.W_OK | os.X_OK, effective_ids=effective):
            read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
            raise output_error(OSError(errno.EROFS if read_only else errno.EACCES, ""), existing)
        if tag is not None and existing == path and RunDirectory(path).is_taken():
            raise OutputError(
                f"{path} already holds a run; continue it with `llmforge finetune --resume {path}`, "
                "or give the new run another custom_model_tag"
            )

    @classmethod
    def create(cls, output_dir: Path, tag: str) -> "RunDirectory":
        """Make the directory of a new run and prove that it can be written to.

        Raises OutputError when the place cannot be written to or holds another run, InputError for an unusable tag.
        """
        cls.check(output_dir, tag)
        run = cls.at(output_dir, tag)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            probe = run.path / f".{secrets.token_hex(4)}.probe"
            probe.write_bytes(b"0")
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise output_error(error, run.path) from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open the directory of an existing run. Raises InputError when `path` is none."""
        if not path.exists():
            raise InputError(f"{path} does not exist; give the directory of a run{_runs_beside(path)}")
        if _is_run(path):
            run = cls(path)
            places = [place for place in (run.path, run.checkpoints) if has_replaced(place)]
            if places:
                with contextlib.suppress(OutputError), run.lock():  # a process at work here is between renames itself
                    for place in places:
                        restore_replaced(place)
            return run
        if _is_run(path.parent):
            raise InputError(f"{path} lies inside a run; give the run's own directory, {path.parent}")
        missing = next((name for name in (_MANIFEST, _CONFIG) if not (path / name).is_file()), _MANIFEST)
        raise InputError(
            f"{path} is not the directory of a run (it has no {missing}){_runs_beside(path / 'run')}"
            if path.is_dir()
            else f"{path} is a file; give the directory of a run"
        )

    @property
    def config(self) -> Path:
        """The config as given."""
        return self.path / _CONFIG

    @property
    def resolved_config(self) -> Path:
        """Every value and its origin."""
        return self.path / "resolved_config.yaml"

    @property
    def manifest(self) -> Path:
        """Versions and hashes."""
        return self.path / _MANIFEST

    @property
    def events(self) -> Path:
        """Status and metrics, one object a line."""
        return self.path / "events.jsonl"

    @property
    def rows(self) -> Path:
        """The row ledger."""
        return self.path / _ROWS

    @property
    def checkpoints(self) -> Path:
        """The parent of `step-NNN/`, the training states."""
        return self.path / "checkpoints"

    @property
    def artifact(self) -> Path:
        """The best model."""
        return self.path / "artifact"

    def is_taken(self) -> bool:
        """Tell a run, or files of the user's own, from what a kill leaves before there is anything to continue."""
        names = {path.name for path in self.path.iterdir() if not _is_half_written(path)}
        return not names <= (_BEGINNING if _MANIFEST in names else {_LOCK})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Have the run to oneself, so that no two processes train it at once. Readers need no lock.

        Files that a kill left half written are deleted: nobody is writing them any more. The system gives the lock back
        when the process ends, however it ends; the file `run.lock` only says who has it. On a file system that knows no
        locks there is none.
        Raises OutputError, naming the process, when another one has it, or when nothing can be written here.
        """
        path = self.path / _LOCK
        try:
            descriptor = _lock(path)
        except BlockingIOError:
            raise OutputError(
                f"{self.path} is being trained by {_holder(path)}; a run belongs to one process at a time. Wait until "
                "it ends, or stop it with ctrl-C or SIGTERM and resume then"
            ) from None
        except OSError as error:
            raise output_error(error, path) from error
        try:
            for file in filter(_is_half_written, list(self.path.iterdir())):
                file.unlink(missing_ok=True)
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is locked: whoever opened it before finds in `_lock` that it is gone
            os.close(descriptor)

    def require_free_space(self, needed: int, *, key: str = "output_dir") -> None:
        """Raise OutputError unless the disk has room for `needed` bytes; `key` says what put the directory there."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OutputError(
                f"this run needs {_gigabytes(needed)} for its checkpoints and artifact, and the disk that holds "
                f"{self.path} has {_gigabytes(free)} free; free some space, set {key} to a larger disk, "
                "or lower num_checkpoints_to_keep"
            )


def safe_name(tag: str) -> str:
    """Turn a tag into one path component: `/` becomes `--`, `:` becomes `-`, other unsafe characters `_`.

    Leading dots and dashes are dropped, so the name is never hidden, never `..`, and never read as an option.
    Raises InputError when nothing is left or too much.
    """
    name = re.sub(r"[^\w.+=@,-]", "_", tag.replace("/", "--").replace(":", "-")).lstrip(".-")
    if not name:
        raise InputError(f"custom_model_tag {tag!r} cannot name a directory; use letters, digits, `-`, `_` or `.`")
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise InputError(
            f"custom_model_tag {tag!r} has {len(os.fsencode(name))} bytes, at most {_LONGEST_NAME} can name a "
            "directory; set a shorter one"
        )
    return name


def _is_run(path: Path) -> bool:
    """Tell a run from a directory of the user's own that happens to hold a config.yaml."""
    if not (path / _CONFIG).is_file():
        return False
    if (path / _MANIFEST).is_file() or (path / _LOCK).is_file():  # the lock's file: of one killed before its manifest
        return True
    return all(child.name == _CONFIG or child.is_dir() for child in path.iterdir())


def _is_half_written(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix in _HALF_WRITTEN and path.is_file()


def _lock(path: Path) -> int:
    """Lock a file, made where it is not there, and write into it who has it; give its descriptor.

    Raises BlockingIOError when another process has it, OSError when the file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        except FileNotFoundError:
            pass  # whoever had it has just let go of it, and deleted it
        except OSError as error:
            if error.errno in _NO_LOCKS_HERE:
                break
            os.close(descriptor)
            raise
        os.close(descriptor)
    with contextlib.suppress(OSError):  # on a full disk, say: the lock holds without it
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    return "another process"


def _nearest_directory(path: Path) -> Path:
    """Give the deepest directory on the way to `path` that exists. Raises OutputError for anything else on the way."""
    for place in (path, *path.parents):
        if place.is_dir():
            return place
        if place.exists() or place.is_symlink():
            what = "is a file" if place.exists() else "is a broken link"
            raise OutputError(f"{place} {what}, so the run cannot be written to {path}; set output_dir to a directory")
    return Path.cwd()


def _runs_beside(path: Path) -> str:
    """Name the runs that lie where `path` was looked for, newest first."""
    if not path.parent.is_dir():
        return ""
    runs = [config.parent for config in path.parent.glob(f"*/{_CONFIG}") if _is_run(config.parent)]
    runs.sort(key=lambda run: (run / _CONFIG).stat().st_mtime, reverse=True)
    return f"; there are {', '.join(str(run) for run in runs[:5])}" if runs else ""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
