"""Prepared samples, their statistics, and the data set they make once the context length is known; encodes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from llmforge.data.ledger import Outcome, RowLedger
from llmforge.data.samples import Sample
from llmforge.data.shards import open_cached
from llmforge.errors import DataError

Overlong = Literal["truncate", "drop", "error"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts of what was read; the `*_tokens` of one sample are over samples, before anything is cut."""

    rows: int
    rejected: int
    samples: int
    tokens: int
    trained_tokens: int
    min_tokens: int
    mean_tokens: float
    median_tokens: float
    p95_tokens: float
    p99_tokens: float
    max_tokens: int


@dataclass(frozen=True)
class PreparedData:
    """Every row that was read, encoded, on disk; in memory only an index of R rows, S samples and B blocks."""

    files: Sequence[str]
    content_hash: str
    shards: Sequence[Path]  # [B]
    row_file: np.ndarray  # int32 [R], index into files
    row_line: np.ndarray  # int64 [R], from 1
    reasons: dict[int, str]  # rejected row → reason
    sample_row: np.ndarray  # int32 [S], ascending
    sample_shard: np.ndarray  # int32 [S], ascending
    sample_index: np.ndarray  # int32 [S], within its shard
    lengths: np.ndarray  # int64 [S]
    trained_tokens: np.ndarray  # int64 [S]

    @cached_property
    def statistics(self) -> Statistics:
        """What a person or a planner wants to know before anything runs."""
        p50, p95, p99 = np.percentile(self.lengths, [50, 95, 99]).tolist()
        return Statistics(
            rows=len(self.row_line),
            rejected=len(self.reasons),
            samples=len(self.lengths),
            tokens=int(self.lengths.sum()),
            trained_tokens=int(self.trained_tokens.sum()),
            min_tokens=int(self.lengths.min()),
            mean_tokens=float(self.lengths.mean()),
            median_tokens=p50,
            p95_tokens=p95,
            p99_tokens=p99,
            max_tokens=int(self.lengths.max()),
        )

    def largest_token_id(self) -> int:
        """Return the largest token id of all samples; reads every shard."""
        return max(int(open_cached(shard).input_ids.max(initial=0)) for shard in self.shards)

    def place(self, row: int) -> tuple[str, int]:
        """Return the file and line of a row."""
        return self.files[self.row_file[row]], int(self.row_line[row])

    def fit(self, context_length: int, overlong: Overlong) -> "Dataset":
        """Apply `overlong` to the samples longer than `context_length` tokens and account for every row.

        `truncate` keeps a sample's first `context_length` tokens. A sample without a trained token teaches nothing and
        is dropped. Raises DataError when `overlong` is "error" and a sample is too long, and when nothing is left.
        """
        too_long = self.lengths > context_length
        if overlong == "error" and too_long.any():
            raise self._overlong_error(context_length, too_long)

        lengths = np.minimum(self.lengths, context_length)
        trained = self._trained_within(context_length, too_long)
        outcome = np.full(len(lengths), Outcome.KEPT, np.int8)
        outcome[too_long] = Outcome.TRUNCATED if overlong == "truncate" else Outcome.DROPPED_OVERLONG
        outcome[(outcome == Outcome.TRUNCATED) & (trained == 0)] = Outcome.DROPPED_BY_TRUNCATION
        outcome[self.trained_tokens == 0] = Outcome.DROPPED_UNTRAINED
        kept = outcome <= Outcome.TRUNCATED
        if not kept.any():
            raise self._nothing_left_error(context_length, overlong)

        ledger = self._ledger(
            outcome,
            lost=np.where(kept, self.lengths - lengths, self.lengths),
            trained_lost=np.where(kept, self.trained_tokens - trained, self.trained_tokens),
            context_length=context_length,
        )
        return Dataset(self, np.flatnonzero(kept), lengths[kept], trained[kept], ledger)

    def _trained_within(self, context_length: int, too_long: np.ndarray) -> np.ndarray:
        trained = self.trained_tokens.copy()
        for shard in np.unique(self.sample_shard[too_long]):
            samples = np.flatnonzero(self.sample_shard == shard)
            trained[samples] = open_cached(self.shards[shard]).trained_tokens(context_length)
        return trained

    def _ledger(
        self, outcome: np.ndarray, lost: np.ndarray, trained_lost: np.ndarray, context_length: int
    ) -> RowLedger:
        rows = len(self.row_line)
        outcome_by_row = np.zeros(rows, np.int8)
        np.maximum.at(outcome_by_row, self.sample_row, outcome)
        outcome_by_row[list(self.reasons)] = Outcome.REJECTED

        def by_row(values: np.ndarray) -> np.ndarray:
            return np.bincount(self.sample_row, weights=values, minlength=rows).astype(np.int64)

        return RowLedger(
            files=self.files,
            file=self.row_file,
            line=self.row_line,
            outcome=outcome_by_row,
            tokens=by_row(self.lengths),
            trained_tokens=by_row(self.trained_tokens),
            tokens_lost_by_row=by_row(lost),
            trained_tokens_lost_by_row=by_row(trained_lost),
            reasons=self.reasons,
            context_length=context_length,
        )

    def _overlong_error(self, context_length: int, too_long: np.ndarray) -> DataError:
        first = int(np.argmax(too_long))
        file, line = self.place(self.sample_row[first])
        more = int(too_long.sum()) - 1
        return DataError(
            f"{self.lengths[first]:,} tokens, more than context_length {context_length:,}"
            + (f" (and {more:,} more like it; the longest has {self.lengths.max():,})" if more else "")
            + "; `overlong: truncate` cuts such rows, `overlong: drop` leaves them out; or raise context_length",
            file=file,
            line=line,
        )

    def _nothing_left_error(self, context_length: int, overlong: Overlong) -> DataError:
        if not self.trained_tokens.any():
            return DataError("no row has a token to train on; at least one assistant turn must have weight 1")
        return DataError(
            f"nothing is left to train on with context_length {context_length:,} and `overlong: {overlong}`: "
            f"the rows have {self.lengths.min():,} to {self.lengths.max():,} tokens; raise context_length"
            + (", or set `overlong: truncate`" if overlong == "drop" else "")
        )


@dataclass(frozen=True)
class Dataset:
    """The samples that are trained on, in reading order; each is read from disk when asked for. Can be pickled."""

    prepared: PreparedData
    kept: np.ndarray  # int64 [N], index into the prepared samples
    lengths: np.ndarray  # int64 [N], as cut
    trained_tokens: np.ndarray  # int64 [N], tokens with a loss weight other than 0
    ledger: RowLedger

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Sample:
        sample = self.kept[index]
        shard = open_cached(self.prepared.shards[self.prepared.sample_shard[sample]])
        return shard.sample(int(self.prepared.sample_index[sample]), int(self.lengths[index]))

    def samples_of_row(self, row: int) -> tuple[list[Sample], int]:
        """Return the samples that a row (counted from 0, as read) is trained as, and how many of its were left out."""
        first, last = np.searchsorted(self.prepared.sample_row, [row, row + 1])
        first_kept, last_kept = np.searchsorted(self.kept, [first, last]).tolist()
        return [self[index] for index in range(first_kept, last_kept)], int(last - first) - (last_kept - first_kept)

    def place(self, index: int) -> tuple[str, int]:
        """Return the file and line that a sample comes from."""
        return self.prepared.place(self.prepared.sample_row[self.kept[index]])
