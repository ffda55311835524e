"""Records what happens in a run, one JSON object a line, and keeps secrets out of everything recorded or shown.

Knows files and the environment; knows no terminal and no tracking service.
"""

import json
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmforge.atomic import output_error
from llmforge.errors import DataError
from llmforge.train.reporter import Reporter

# What has happened up to these survives a power cut, as the checkpoint itself does.
_LANDMARKS = ("checkpoint", "finished", "failed")


class EventLog:
    """Appends events to `events.jsonl`, each handed to the system when it happens, and at landmarks to the disk.

    JSON has no NaN or infinity: such a value is written as null, and `non_finite` names it (`{"train_loss": "nan"}`).
    Raises OutputError when the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
            self._drop_half_line()
        except OSError as error:
            raise output_error(error, path) from error

    def event(self, event: str, **fields: Any) -> None:
        """Append one event with its time (ISO 8601, UTC)."""
        non_finite: dict[str, str] = {}
        record = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        record |= {name: as_json(value, name, non_finite) for name, value in fields.items()}
        if non_finite:
            record["non_finite"] = non_finite  # type: ignore[assignment]
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            # One write of the whole line: a kill leaves it whole or leaves an end that the next opening removes.
            self._file.write(line.encode("utf-8", "backslashreplace"))
            if event in _LANDMARKS:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise output_error(error, self._path) from error

    def note(self, text: str) -> None:
        """Append what a person was told, as the event `note`."""
        self.event("note", text=text)

    def close(self) -> None:
        """Close the file; every event is on it already."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _drop_half_line(self) -> None:
        """Truncate to the last newline: whatever stands behind it was being written when the run was killed."""
        end = position = self._file.tell()
        with open(self._path, "rb") as file:
            while position > 0:
                start = max(0, position - 4096)
                file.seek(start)
                newline = file.read(position - start).rfind(b"\n")
                if newline >= 0:
                    position = start + newline + 1
                    break
                position = start
        if position != end:
            os.truncate(self._path, position)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read all events of a run, also while it runs or after a kill (a half-written last line is left out).

    Fields that `non_finite` names are NaN or infinite again.
    Raises DataError with the line number when another line is no JSON object.
    """
    events = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            event = json.loads(line)
        except ValueError as error:
            raise DataError(f"not a JSON object: {error}", file=str(path), line=number) from error
        if not isinstance(event, dict):
            raise DataError(f"not a JSON object but {type(event).__name__}", file=str(path), line=number)
        event |= {name: float(value) for name, value in event.get("non_finite", {}).items() if name in event}
        events.append(event)
    return events


class EventTail:
    """Reads the events that are appended to a file from now on, by whichever process writes them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.is_file() else 0

    def new(self) -> list[dict[str, Any]]:
        """Give the events since the last call; a line that is not whole yet comes later."""
        if not self._path.is_file():
            return []
        with open(self._path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:  # a half line of a killed worker was cut off
                self._offset = os.fstat(file.fileno()).st_size
            file.seek(self._offset)
            lines = file.read().split(b"\n")
        whole = lines[:-1]
        self._offset += sum(len(line) + 1 for line in whole)
        events = []
        for line in whole:
            event = json.loads(line)
            event |= {name: float(value) for name, value in event.pop("non_finite", {}).items() if name in event}
            events.append(event)
        return events


class Reporters:
    """Passes everything on to several reporters, in order.

    The `optional` ones (tracking services) come last and cannot stop a run: one that fails is told nothing more, and
    the others say so once.
    """

    def __init__(self, required: Sequence[Reporter], optional: Sequence[Reporter] = ()) -> None:
        self._required = list(required)
        self._optional = list(optional)

    def event(self, event: str, **fields: Any) -> None:
        """Pass one event on."""
        for reporter in self._required:
            reporter.event(event, **fields)
        for reporter in list(self._optional):
            try:
                reporter.event(event, **fields)
            except Exception as error:
                self._optional.remove(reporter)
                self.note(f"{type(reporter).__name__} failed and gets no more metrics; the run goes on. {error}")

    def note(self, text: str) -> None:
        """Pass one note on; only the required reporters are for people."""
        for reporter in self._required:
            reporter.note(text)


def as_json(value: Any, name: str = "", non_finite: dict[str, str] | None = None) -> Any:
    """Turn a value into what JSON can hold: numpy scalars become numbers, paths text, and secrets are redacted.

    NaN and infinities become null and are recorded in `non_finite` under their dotted name.
    """
    match value:
        case None | bool():
            return value
        case str() | Path():
            return redact(str(value))
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            number = float(value)
            if math.isfinite(number):
                return number
            if non_finite is not None:
                non_finite[name] = str(number)
            return None
        case Mapping():
            return {str(key): as_json(item, f"{name}.{key}", non_finite) for key, item in value.items()}
        case Sequence() | set() | frozenset():
            return [as_json(item, f"{name}.{index}", non_finite) for index, item in enumerate(value)]
    raise TypeError(f"{name or 'value'}: {type(value).__name__} cannot be written as JSON")


_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|API_KEY|ACCESS_KEY|SECRET_KEY|PRIVATE_KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE
)
_SHORTEST_SECRET = 8  # a shorter value would blank out ordinary words
_SECRET_SHAPES = (
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}"), "[a Hugging Face token]"),
    (re.compile(r"(?<=://)[^\s/@]+:[^\s/@]+@"), "[credentials]@"),
)


def redact(text: str) -> str:
    """Replace the values of environment variables that hold secrets (`HF_TOKEN`, `*_API_KEY`, …) by their names.

    Hugging Face tokens and `user:password@` in URLs are replaced wherever they come from.
    """
    secrets = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name)
    }
    for value in sorted(secrets, key=len, reverse=True):  # one secret may contain another
        text = text.replace(value, f"[{secrets[value]}]")
    for shape, replacement in _SECRET_SHAPES:
        text = shape.sub(replacement, text)
    return text
