"""The directory of one run: where each of its files lies, and whether there is a place and room for them.

It knows names and space, not contents: who writes a file decides what is in it.
"""

import errno
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from llmforge.atomic import output_error, restore_replaced
from llmforge.errors import InputError, OutputError

_CONFIG, _MANIFEST = "config.yaml", "manifest.json"
_LONGEST_NAME = 200  # bytes; file systems allow 255, and temporary siblings need some of them


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
        if not os.access(existing, os.W_OK | os.X_OK):
            read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
            raise output_error(OSError(errno.EROFS if read_only else errno.EACCES, ""), existing)
        if tag is not None and existing == path and any(path.iterdir()):
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
            probe.unlink()
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
            for parent in (run.path, run.checkpoints):
                restore_replaced(parent)
            return run
        if _is_run(path.parent):
            raise InputError(f"{path} lies inside a run; give the run's own directory, {path.parent}")
        raise InputError(
            f"{path} is not the directory of a run (it has no {_MANIFEST}){_runs_beside(path / 'run')}"
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
        return self.path / "rows.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The parent of `step-NNN/`, the training states."""
        return self.path / "checkpoints"

    @property
    def artifact(self) -> Path:
        """The best model."""
        return self.path / "artifact"

    def require_free_space(self, needed: int) -> None:
        """Raise OutputError unless the disk has room for `needed` bytes."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OutputError(
                f"this run needs {_gigabytes(needed)} for its checkpoints and artifact, and the disk that holds "
                f"{self.path} has {_gigabytes(free)} free; free some space, set output_dir to a larger disk, "
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
    return (path / _MANIFEST).is_file() or all(child.name == _CONFIG or child.is_dir() for child in path.iterdir())


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
