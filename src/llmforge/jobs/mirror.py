"""Keeps a run's directory in a bucket: the run works in a local directory, and what changes there is uploaded.

A thread uploads while the training goes on. What it uploads are hard links to the files as they were when it began, so
that a checkpoint that is superseded meanwhile stays whole until it is there.

The order of uploads and deletions makes a kill at any moment leave the bucket with the old state or the new one. A
checkpoint counts when its `state.json` is there, a run has finished when its `events.jsonl` says so, and a run can be
continued once its `resolved_config.yaml` is there: each comes behind what it speaks for.
"""

import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from llmforge.bucket import BucketDirectory, Entry, bucket_url, copy_to_cache, local_parts, url_of_parts
from llmforge.config import derive
from llmforge.config.schema import FineTuningConfig
from llmforge.errors import BucketError, InputError, OutputError
from llmforge.jobs.run_directory import RunDirectory, safe_name

STATE = "state.json"  # of a checkpoint; `llmforge.checkpoint` writes it, and importing that would import torch
CONFIG, MANIFEST, RESOLVED, EVENTS = "config.yaml", "manifest.json", "resolved_config.yaml", "events.jsonl"
CHECKPOINTS, ARTIFACT = "checkpoints/", "artifact/"
_STAGING = "staging"
_PINNED = ".uploading"  # in a run's directory: what is being uploaded
_WHOLE = (CHECKPOINTS, ARTIFACT, CONFIG, MANIFEST, RESOLVED, "rows.jsonl")  # made in one piece, never written into
_PINNING = 10  # times that it is tried: each time only fails if a checkpoint was just then superseded
_STEP = re.compile(r"checkpoints/step-(\d{6,})/")
_FINISHED = b'{"event": "finished"'
_TAIL = 1 << 16  # bytes of the events that are looked through for the last one
_ATTEMPTS_AT_THE_END = 2  # of a run that failed or was interrupted: somebody waits


class Mirror:
    """A run's directory in a bucket, and the local one that stands for it while the run works.

    It is a reporter: when it hears of a checkpoint, it uploads behind the training's back, one time after the other;
    what comes while it is at it goes into the next time. While the run goes on, an outage is told once and does not
    stop it.
    """

    def __init__(self, url: str, cache_dir: Path) -> None:
        self.url = url
        self.cache_dir = cache_dir
        self.bucket = BucketDirectory(url)
        self.directory = cache_dir.joinpath(_STAGING, *local_parts(url))
        self.tell: Callable[[str], None] = lambda text: None
        self._told = False
        self._turn = threading.Lock()  # for what the thread and others change
        self._thread: threading.Thread | None = None
        self._again = False  # whether it is to upload once more
        self._failure: BucketError | OSError | None = None  # of the last time
        self._uploaded: dict[str, tuple[int, int, Entry]] = {}  # name → size, time of change, and what the store said

    @classmethod
    def of(cls, output_dir: str, tag: str, cache_dir: Path) -> "Mirror | None":
        """Give the mirror of a run of this tag; None where `output_dir` is local."""
        url = bucket_url(output_dir)
        return None if url is None else cls(f"{url}/{safe_name(tag)}", cache_dir)

    @staticmethod
    def check(config: FineTuningConfig) -> None:
        """Find out whether the bucket is there and can be written to, and whether the tag, if it is known, is free.

        Raises OutputError.
        """
        url = bucket_url(config.output_dir)
        assert url is not None
        cache_dir = Path(config.cache_dir or derive.cache_dir().value).expanduser().resolve()
        try:
            BucketDirectory(url).check_writable()
        except BucketError as error:
            raise OutputError(f"output_dir: {error}") from error
        if config.custom_model_tag is not None:
            Mirror(f"{url}/{safe_name(config.custom_model_tag)}", cache_dir).claim()

    def claim(self) -> None:
        """Check that no run is there yet, in the bucket or locally; clear away the copy of one that was deleted there.

        Raises OutputError.
        """
        try:
            there = self.bucket.entries()
        except BucketError as error:
            raise OutputError(f"output_dir: {error}") from error
        if there and (MANIFEST not in there or RESOLVED in there):  # else a start was cut off in its first upload
            raise OutputError(
                f"{self.url} already holds a run; continue it with `llmforge finetune --resume {self.url}`, or give "
                "the new run another custom_model_tag"
            )
        if self._marker.is_file():
            shutil.rmtree(self.directory, ignore_errors=True)
            self._marker.unlink()
        if self.directory.is_dir() and RunDirectory(self.directory).is_taken():
            raise OutputError(
                f"{self.directory} still holds the local copy of an earlier run that was to be mirrored to {self.url}, "
                f"where there is none. Continue it with `llmforge finetune --resume {self.directory}`, delete it, or "
                "give the new run another custom_model_tag"
            )

    @classmethod
    def to_resume(cls, place: str | Path, note: Callable[[str], None]) -> "Mirror | None":
        """Bring the local copy of a run up to the bucket's state; None where `place` is a run of its own on this disk.

        Where the copy is ahead of the bucket, as after an outage, it stays as it is. `place` may also be that copy;
        then the bucket need not be there.

        Raises:
            InputError: there is no run, or the local copy is of another one.
            BucketError: the bucket cannot be read.
        """
        url = bucket_url(place)
        if url is None:
            mirror = cls._of_copy(Path(place))
            if mirror is None:
                return None
            try:
                mirror._fetch()
            except BucketError as error:
                note(f"{error}; the run goes on from its local copy")
            return mirror
        bucket = BucketDirectory(url)
        try:
            mirror = cls(url, _cache_dir(bucket, bucket.entries()))
            mirror._fetch()
        except BucketError as error:
            copy = cls(url, Path(derive.cache_dir().value)).directory
            if not (copy / RESOLVED).is_file():
                raise
            raise BucketError(
                f"{error}. The run's local copy can go on without it: llmforge finetune --resume {copy}"
            ) from error
        return mirror

    def event(self, event: str, **fields: Any) -> None:
        """Begin to upload what there is when a checkpoint was written, and tell of an upload that has failed."""
        if event == "checkpoint":
            with self._turn:
                self._again = True
                if self._thread is None:
                    self._thread = threading.Thread(target=self._upload_behind, daemon=True)
                    self._thread.start()
        self._tell_of_failure()

    def note(self, text: str) -> None:
        """Do nothing: notes are among the events that are uploaded."""

    def try_upload(self) -> None:
        """Upload what changed; where the bucket cannot be had, say so, once, and leave it to the next time."""
        self._wait()
        self._try()
        self._tell_of_failure()

    def stop(self) -> None:
        """Upload what there is of a run that failed or was interrupted, without insisting: somebody waits."""
        with self.bucket.trying(_ATTEMPTS_AT_THE_END):
            self.try_upload()

    def finish(self) -> None:
        """Upload the rest of a finished run.

        Raises OutputError, saying where the run is and how to go on, where the bucket cannot be had.
        """
        self._wait()
        try:
            self.upload()
        except (BucketError, OSError) as error:
            raise OutputError(
                f"the run has finished, but {self.url} could not be written: {error}. Nothing is lost: all of it is in "
                f"{self.directory}. When the bucket can be had again, `llmforge finetune --resume {self.directory}` "
                f"uploads the rest (on this machine, so does --resume {self.url})"
            ) from error
        self._marker.touch()

    def upload(self) -> None:
        """Make the bucket hold what the local directory holds now.

        Raises BucketError or OSError; what was there before is then still there, and still whole.
        """
        there = self.bucket.entries()
        with _pinned(self.directory) as here:
            changed = [name for name in sorted(here, key=_turn) if not self._is_there(name, here[name], there)]
            # A checkpoint that is written over with another content is none until it is whole again.
            steps = {step[0] for name in changed if (step := _STEP.match(name)) and not name.endswith(f"/{STATE}")}
            self.bucket.delete(f"{step}{STATE}" for step in sorted(steps) if f"{step}{STATE}" in there)
            changed += [f"{step}{STATE}" for step in steps if f"{step}{STATE}" in here]
            for name in here.keys() - set(changed):
                here[name].unlink()  # those that wait for their turn are all that takes space
            for name in sorted(set(changed), key=_turn):
                path = here[name]
                before = path.stat()
                self._uploaded[name] = (before.st_size, before.st_mtime_ns, self.bucket.upload(path, name))
                path.unlink()
        self.bucket.delete(_superseded(here, there))

    def _upload_behind(self) -> None:
        """Upload as often as there is something new; what the thread does."""
        while True:
            with self._turn:
                if not self._again:
                    self._thread = None
                    return
                self._again = False
            self._try()

    def _wait(self) -> None:
        """Wait until the thread is done with the upload that it is at; who waits makes the next one."""
        with self._turn:
            self._again = False
            thread = self._thread
        if thread is not None:
            thread.join()

    def _try(self) -> None:
        try:
            self.upload()
        except (BucketError, OSError) as error:
            with self._turn:
                self._failure = error

    def _tell_of_failure(self) -> None:
        with self._turn:
            error, self._failure = self._failure, None
        if error is not None and not self._told:
            self._told = True
            self.tell(
                f"{error}. The run goes on in {self.directory}; what the bucket lacks is uploaded with the next "
                "checkpoint, or at the end"
            )

    def _is_there(self, name: str, path: Path, there: Mapping[str, Entry]) -> bool:
        now = path.stat()
        size, changed, entry = self._uploaded.get(name, (-1, -1, None))
        if (size, changed) == (now.st_size, now.st_mtime_ns):
            return there.get(name) == entry
        if not self.bucket.holds(name, there.get(name), path):
            return False
        self._uploaded[name] = (now.st_size, now.st_mtime_ns, there[name])
        return True

    def _fetch(self) -> None:
        """Download the state of the run, unless the local copy is at least as far."""
        there = self.bucket.entries()
        here = _files(self.directory)
        if RESOLVED in here and RESOLVED not in there and (not there or MANIFEST in there):
            return  # its first upload was cut off, or never began: the bucket has nothing that is not here
        if CONFIG not in there and (RESOLVED in there or MANIFEST not in there):
            raise InputError(
                f"{self.url} is not the directory of a run (it has no {CONFIG}); give the place of a run, such as "
                f"{self.url.rpartition('/')[0]}/NAME"
            )
        if RESOLVED in here and RESOLVED in there and self.bucket.read(RESOLVED) != here[RESOLVED].read_bytes():
            raise InputError(
                f"{self.directory} is the local copy of another run that was to be mirrored to {self.url}; move or "
                "delete it"
            )
        if RESOLVED not in there and RESOLVED not in here:
            raise InputError(
                f"{self.url} was stopped while it was being prepared and holds nothing to continue; start the run "
                "again, with `llmforge finetune` and its YAML file"
            )
        has_finished = self._has_finished(there)
        position_there = (has_finished, max(_whole(there), default=-1))
        position_here = (
            _FINISHED in here[EVENTS].read_bytes() and (self.directory / ARTIFACT).is_dir()
            if EVENTS in here
            else False,
            max(_whole(here), default=-1),
        )
        if RESOLVED in here and position_here >= position_there:
            return
        wanted = {
            name: entry
            for name, entry in there.items()
            if not name.startswith(CHECKPOINTS) and (has_finished or not name.startswith(ARTIFACT)) and name != RESOLVED
        }
        self._download(wanted)
        whole = _whole(there)
        for step in () if has_finished else sorted(whole):  # the newest last: a copy that has it has everything
            self._download_checkpoint(whole[step], there)
        self._download({RESOLVED: there[RESOLVED]})
        for path in self.directory.glob(f"{CHECKPOINTS}*"):
            if f"{CHECKPOINTS}{path.name}/" not in whole.values():
                shutil.rmtree(path, ignore_errors=True)
        if not has_finished:
            shutil.rmtree(self.directory / ARTIFACT, ignore_errors=True)

    def _download_checkpoint(self, folder: str, there: Mapping[str, Entry]) -> None:
        state = f"{folder}{STATE}"
        rest = {name: there[name] for name in there if name.startswith(folder) and name != state}
        if self._missing(rest):
            (self.directory / state).unlink(missing_ok=True)
            self._download(rest)
        self._download({state: there[state]})

    def _download(self, entries: Mapping[str, Entry]) -> None:
        """Download files that are not here as they are there."""
        try:
            self.bucket.download_all(self._missing(entries), self.directory)
        except OSError as error:
            raise OutputError(
                f"{self.url} cannot be copied to {self.directory} ({error.strerror or type(error).__name__}); free "
                "some space there"
            ) from error

    def _missing(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        return {
            name: entry
            for name, entry in entries.items()
            if not (self.directory / name).is_file() or not self.bucket.holds(name, entry, self.directory / name)
        }

    def _has_finished(self, there: Mapping[str, Entry]) -> bool:
        events = there.get(EVENTS)
        if events is None or not any(name.startswith(ARTIFACT) for name in there):
            return False
        return _FINISHED in self.bucket.read(EVENTS, max(0, events.size - _TAIL), events.size)

    @property
    def _marker(self) -> Path:
        """A file beside the local copy that says: the run has finished, and the bucket has all of it."""
        return self.directory.with_name(f".{self.directory.name}.mirrored")

    @classmethod
    def _of_copy(cls, path: Path) -> "Mirror | None":
        parts = path.expanduser().resolve().parts
        for place in range(len(parts) - 3, 0, -1):
            if parts[place - 1] == _STAGING and bucket_url(url := url_of_parts(parts[place:])) == url:
                return cls(url, Path(*parts[: place - 1]))
        return None


def download_run(url: str) -> Path:
    """Give a local copy of a run in a bucket, without its checkpoints, or of an artifact.

    Raises:
        InputError: there is neither.
        BucketError: the bucket cannot be read.
    """
    directory = BucketDirectory(url)
    if url.endswith(f"/{ARTIFACT.rstrip('/')}"):  # the run around it says how its model is to be loaded
        run = BucketDirectory(url.rpartition("/")[0])
        entries = run.entries()
        if RESOLVED in entries:
            return _copy(run, entries) / ARTIFACT
    entries = directory.entries()
    if not _is_of_a_run(entries):
        raise InputError(f"{url} holds neither a run nor an artifact; give the place of one")
    return _copy(directory, entries)


def holds_run(url: str) -> bool:
    """Say whether a place in a bucket is a run or an artifact. Raises BucketError when the bucket cannot be read."""
    return _is_of_a_run(BucketDirectory(url).entries())


def _is_of_a_run(entries: Mapping[str, Entry]) -> bool:
    return any(name in entries for name in (CONFIG, "prompt_format.yaml", "proof.json"))


def _copy(directory: BucketDirectory, entries: Mapping[str, Entry]) -> Path:
    wanted = {name: entry for name, entry in entries.items() if not name.startswith(CHECKPOINTS)}
    cache_dir = Path(derive.cache_dir().value)
    try:
        return copy_to_cache(directory, wanted, wanted, cache_dir)
    except OSError as error:
        raise OutputError(
            f"{directory.url} cannot be stored in the cache {cache_dir} ({error.strerror or type(error).__name__}); "
            "free some space there, or set XDG_CACHE_HOME to another place"
        ) from error


def _cache_dir(bucket: BucketDirectory, there: Mapping[str, Entry]) -> Path:
    """Give the cache that a run was started with, if this machine has a place for it, and this machine's own if not."""
    own = Path(derive.cache_dir().value)
    if RESOLVED not in there:
        return own
    try:
        given = yaml.safe_load(bucket.read(RESOLVED)).get("cache_dir")
        origins = json.loads(bucket.read(MANIFEST)).get("origins", {}) if MANIFEST in there else {}
    except (ValueError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{bucket.url}/{RESOLVED} or {MANIFEST} is damaged ({error}); start the run again") from error
    if not isinstance(given, str) or str(origins.get("cache_dir", "")).startswith("derived"):
        return own
    path = Path(given).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path.resolve()
    except OSError:
        return own


def _files(directory: Path) -> dict[str, Path]:
    """List the files of a directory by their names in the bucket, without hidden ones, which are being written.

    Nor with `run.lock`, which says which process here has the run.
    """
    found = {
        path.relative_to(directory): path
        for path in directory.rglob("*")
        if path.is_file() and path != directory / "run.lock"
    }
    return {
        name.as_posix(): path for name, path in found.items() if not any(part.startswith(".") for part in name.parts)
    }


@contextmanager
def _pinned(directory: Path) -> Iterator[dict[str, Path]]:
    """Give a run's files, by their names in the bucket, as they are now, whatever happens to the run inside the block.

    They are hard links, where the file system has them; files that are appended to are copied.
    """
    place = directory / _PINNED
    shutil.rmtree(place, ignore_errors=True)  # of a run that was killed
    try:
        for _ in range(_PINNING):
            try:
                here = _pin(directory, place)
                break
            except FileNotFoundError:
                shutil.rmtree(place, ignore_errors=True)
        else:
            raise OSError(f"the files of {directory} change too fast to be uploaded")
        yield here
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _pin(directory: Path, place: Path) -> dict[str, Path]:
    """Link or copy a run's files to `place`. Raises FileNotFoundError where one is replaced or deleted meanwhile."""
    here: dict[str, Path] = {}

    def pin(names: Mapping[str, Path]) -> None:
        folders = {path.parent: path.parent.stat() for path in names.values()}
        for name, path in names.items():
            here[name] = place / name
            here[name].parent.mkdir(parents=True, exist_ok=True)
            if not (name.startswith(_WHOLE) and _link(path, here[name])):
                _copy_as_it_is(path, here[name])
        if any(not os.path.samestat(before, folder.stat()) for folder, before in folders.items()):
            raise FileNotFoundError(directory)

    # Checkpoints before the events that led to them, and the artifact behind the event that says that it is there.
    pin({name: path for name, path in _files(directory).items() if name.startswith(CHECKPOINTS)})
    if (directory / EVENTS).is_file():
        pin({EVENTS: directory / EVENTS})
    pin({n: path for n, path in _files(directory).items() if n not in here and not n.startswith(CHECKPOINTS)})
    return here


def _link(path: Path, other: Path) -> bool:
    try:
        os.link(path, other)
    except FileNotFoundError:
        raise
    except OSError:
        return False  # not on every file system
    return True


def _copy_as_it_is(path: Path, copy: Path) -> None:
    """Copy a file to which something may be appended meanwhile: its size and the time of its change fit its content."""
    before = path.stat()
    with path.open("rb") as source, copy.open("wb") as target:
        left = before.st_size
        while left and (piece := source.read(min(left, 1 << 20))):
            target.write(piece)
            left -= len(piece)
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))


def _turn(name: str) -> tuple[int, int, bool, str]:
    """Say when it is a file's turn: what says that something is whole comes behind it. Checkpoints come one by one."""
    step = _STEP.match(name)
    if name == MANIFEST:  # the first, so that what a start leaves is known to be one
        return -1, -1, False, name
    kind = 3 if step else 1 if name == EVENTS else 2 if name == RESOLVED else 0
    return kind, int(step[1]) if step else -1, name.endswith(f"/{STATE}"), name


def _whole(names: Iterable[str]) -> dict[int, str]:
    """Give the folders of the checkpoints that are whole, by their step."""
    return {int(step[1]): step[0] for name in names if (step := _STEP.match(name)) and name == f"{step[0]}{STATE}"}


def _superseded(here: Iterable[str], there: Iterable[str]) -> list[str]:
    """Give the files to delete in the bucket: checkpoints that are gone here, and other files of an older artifact.

    What says that a checkpoint is whole goes first.
    """
    local = set(here)
    has_artifact = any(name.startswith(ARTIFACT) for name in local)
    gone = [
        name
        for name in there
        if name not in local and (name.startswith(CHECKPOINTS) or (has_artifact and name.startswith(ARTIFACT)))
    ]
    if max(_whole(local), default=-1) < max(_whole(there), default=-1):  # as where somebody deleted them here
        gone = [name for name in gone if not name.startswith(CHECKPOINTS)]
    return sorted(gone, key=lambda name: (not name.endswith(f"/{STATE}"), name))
