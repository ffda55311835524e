"""What a row is and who judges it. Reading is in `blocks`, conversion in `formats`, the checks in `conversation`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmforge.data.samples import Sample
from llmforge.errors import DataError

# data_format → (columns it needs, columns it may have)
FORMATS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools",)),
    "prompt_completion": (("prompt", "completion"), ("system",)),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "text": (("text",), ()),
}


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Why one row cannot be used: a short sentence that says what was given and what was expected."""

    reason: str


# Gets rows in messages form, some hundreds at a time, and gives each its samples (several when a conversation is
# unrolled) or its problem. It must be picklable, and a pure function of the row: its results are cached.
RowEncoder = Callable[[Sequence[dict[str, Any]]], list[list[Sample] | RowProblem]]


class BadRow(Exception):  # noqa: N818  (never leaves this room: it becomes a RowProblem)
    """Raised by the checks of one row."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How the rows of a data set are written down.

    `columns` maps our column names to theirs. `needs_assistant`: a conversation without an assistant turn is a problem.
    Raises DataError for a format or a column that does not exist.
    """

    data_format: str = "messages"
    columns: Mapping[str, str] = field(default_factory=dict)
    needs_assistant: bool = True

    def __post_init__(self) -> None:
        if self.data_format not in FORMATS:
            raise DataError(f"data_format {self.data_format!r} does not exist; choose one of {', '.join(FORMATS)}")
        needed, optional = FORMATS[self.data_format]
        for ours in self.columns:
            if ours not in needed + optional:
                raise DataError(
                    f"columns: {ours!r} is not a column of data_format {self.data_format!r}, which has "
                    f"{', '.join(needed + optional)}; write `columns: {{<one of these>: <the column in your file>}}`"
                )

    @property
    def fingerprint(self) -> str:
        """Return a text that is equal for layouts that read rows alike."""
        return json.dumps([self.data_format, sorted(self.columns.items()), self.needs_assistant])


def shown(value: object, limit: int = 60) -> str:
    """Return `value` as it may stand in a message: on one line, and not long."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
