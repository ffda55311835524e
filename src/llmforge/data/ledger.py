"""The row ledger: what became of every row that was read. It counts and writes; others decide."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np

from llmforge.atomic import output_error

ROWS_PER_WRITE = 65_536


class Outcome(IntEnum):
    """What became of a sample, and why; a row with several samples has the worst of theirs, which is the largest."""

    KEPT = 0
    TRUNCATED = 1
    DROPPED_OVERLONG = 2
    DROPPED_BY_TRUNCATION = 3
    DROPPED_UNTRAINED = 4
    REJECTED = 5

    @property
    def status(self) -> str:
        """The outcome without its reason: kept, truncated, dropped or rejected."""
        return self.name.partition("_")[0].lower()


@dataclass(frozen=True)
class RowLedger:
    """One entry per row read (R of them), in reading order; kept + truncated + dropped + rejected = R, always."""

    files: Sequence[str]
    file: np.ndarray  # int32 [R], index into files
    line: np.ndarray  # int64 [R], from 1
    outcome: np.ndarray  # int8 [R], an Outcome
    tokens: np.ndarray  # int64 [R], before anything was lost; 0 for a rejected row, which was never encoded
    trained_tokens: np.ndarray  # int64 [R]
    tokens_lost_by_row: np.ndarray  # int64 [R]
    trained_tokens_lost_by_row: np.ndarray  # int64 [R]
    reasons: Mapping[int, str]  # rejected row → reason
    context_length: int

    @property
    def rows(self) -> int:
        """Rows read."""
        return len(self.outcome)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status: kept, truncated, dropped, rejected."""
        counts = dict.fromkeys(("kept", "truncated", "dropped", "rejected"), 0)
        for outcome, count in zip(Outcome, np.bincount(self.outcome, minlength=len(Outcome)), strict=True):
            counts[outcome.status] += int(count)
        return counts

    @property
    def kept(self) -> int:
        """Rows that lost nothing."""
        return self.counts["kept"]

    @property
    def truncated(self) -> int:
        """Rows that lost tokens, but of which something is trained."""
        return self.counts["truncated"]

    @property
    def dropped(self) -> int:
        """Rows that lost at least one sample whole: over-long, or without a trained token."""
        return self.counts["dropped"]

    @property
    def rejected(self) -> int:
        """Rows that could not be read or encoded."""
        return self.counts["rejected"]

    @property
    def tokens_lost(self) -> int:
        """Tokens cut or dropped, over all rows."""
        return int(self.tokens_lost_by_row.sum())

    @property
    def trained_tokens_lost(self) -> int:
        """Those of the lost tokens that carried loss."""
        return int(self.trained_tokens_lost_by_row.sum())

    def write(self, path: Path) -> None:
        """Write rows.jsonl, one object a row, whole or not at all. Raises OutputError."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                for start in range(0, self.rows, ROWS_PER_WRITE):
                    file.writelines(self._lines(start, start + ROWS_PER_WRITE))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise output_error(error, path) from error

    def _lines(self, start: int, stop: int) -> Iterator[str]:
        # A million rows pass here, so the objects are written out by hand; only what varies is encoded.
        files = [json.dumps(file) for file in self.files]
        columns = zip(
            range(start, stop),
            self.file[start:stop].tolist(),
            self.line[start:stop].tolist(),
            self.outcome[start:stop].tolist(),
            self.tokens[start:stop].tolist(),
            self.trained_tokens[start:stop].tolist(),
            self.tokens_lost_by_row[start:stop].tolist(),
            self.trained_tokens_lost_by_row[start:stop].tolist(),
            strict=False,  # the range may reach past the last row
        )
        statuses = [outcome.status for outcome in Outcome]
        for row, file, line, outcome, tokens, trained, lost, trained_lost in columns:
            reason = f'"reason": {json.dumps(self._reason(row, tokens, lost))}, ' if outcome else ""
            yield (
                f'{{"file": {files[file]}, "line": {line}, "status": "{statuses[outcome]}", {reason}'
                f'"tokens": {tokens}, "trained_tokens": {trained}, '
                f'"tokens_lost": {lost}, "trained_tokens_lost": {trained_lost}}}\n'
            )

    def _reason(self, row: int, tokens: int, lost: int) -> str:
        match Outcome(self.outcome[row]):
            case Outcome.TRUNCATED:
                return f"longer than context_length {self.context_length}: {lost} of {tokens} tokens cut"
            case Outcome.DROPPED_OVERLONG:
                return f"longer than context_length {self.context_length}, and overlong is drop"
            case Outcome.DROPPED_BY_TRUNCATION:
                return f"no trained token within context_length {self.context_length}"
            case Outcome.DROPPED_UNTRAINED:
                return "no trained token"
            case _:
                return self.reasons[row]
