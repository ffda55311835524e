"""Turns files into prepared data: in parallel, in bounded memory, and never the same block twice.

Each block becomes one shard in the cache, named by a hash of the block's content and of all that decides its encoding.
What is there is used; so a second run starts at once, and a killed one goes on where it was.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np

from llmforge.data.blocks import BLOCK_BYTES
from llmforge.data.dataset import PreparedData
from llmforge.data.executors import EncodedBlock, Executor, ShardMaker, encode_here
from llmforge.data.files import without_secrets
from llmforge.data.rows import RowEncoder, RowLayout
from llmforge.data.shards import open_shard, unwritable_cache
from llmforge.errors import DataError

PROBLEMS_SHOWN = 5
STALE_SECONDS = 3600


def prepare(
    files: Sequence[str],
    *,
    layout: RowLayout,
    encode: RowEncoder,
    fingerprint: str,
    cache_dir: Path,
    workers: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    progress: Callable[[int], None] | None = None,
    block_bytes: int = BLOCK_BYTES,
    executor: Executor = encode_here,
) -> PreparedData:
    """Read, check and encode the rows of `files`, reusing the shards in `cache_dir` that fit.

    `fingerprint` names everything `encode` depends on (tokenizer, prompt format, task). `executor` does the work, by
    default in `workers` processes of this machine; None means one per core. The result is the same whoever does it.
    `progress` is told the number of rows done so far. What stays in memory here is some 100 bytes a row.

    Raises DataError for a file that cannot be read or holds no row, for the first bad row under `on_bad_row="error"`,
    and when no row is good; OutputError when `cache_dir` cannot be written to. An exception in `encode` surfaces as it
    is, with a note of file and lines.
    """
    _make_cache(cache_dir)
    maker = ShardMaker(cache_dir, layout, fingerprint, encode, block_bytes)
    index = _Index(files)
    with closing(executor(files, maker, workers)) as encoded:
        for block in encoded:
            index.add(block)
            if index.reasons and on_bad_row == "error":
                raise index.bad_row_error()
            if progress is not None:
                progress(index.rows)
    return index.prepared_data()


class _Index:
    """What is known of the rows and samples so far, block by block in reading order."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = [without_secrets(file) for file in files]
        self.rows = 0
        self.samples = 0
        self.reasons: dict[int, str] = {}
        self._rows_of_file = [0] * len(files)
        self._hash = hashlib.blake2b(digest_size=20)
        self._shards: list[Path] = []
        self._columns: dict[str, list[np.ndarray]] = {
            name: []
            for name in (
                "row_file",
                "row_line",
                "sample_row",
                "sample_shard",
                "sample_index",
                "lengths",
                "trained_tokens",
            )
        }

    def add(self, block: EncodedBlock) -> None:
        shard = open_shard(block.shard)
        rows, samples = len(shard.lines), len(shard.token_ends) - 1
        for row, reason in shard.reasons.items():
            self.reasons[self.rows + row] = sys.intern(reason)  # thousands of rows have few kinds of problem
        for name, values in (
            ("row_file", np.full(rows, block.file_number, np.int32)),
            ("row_line", shard.lines.astype(np.int64) + block.first_line),
            ("sample_row", np.repeat(np.arange(self.rows, self.rows + rows), np.diff(shard.sample_ends))),
            ("sample_shard", np.full(samples, len(self._shards), np.int32)),
            ("sample_index", np.arange(samples, dtype=np.int32)),
            ("lengths", shard.lengths),
            ("trained_tokens", shard.trained_tokens()),
        ):
            self._columns[name].append(values)
        self._hash.update(f"{block.file_number} {block.digest}\n".encode())
        self._shards.append(block.shard)
        self._rows_of_file[block.file_number] += rows
        self.rows += rows
        self.samples += samples

    def bad_row_error(self) -> DataError:
        """Name the first bad row, some of those behind it, and what can be done."""
        (file, line, reason), *others = [
            (*self._place(row), self.reasons[row]) for row in list(self.reasons)[:PROBLEMS_SHOWN]
        ]
        lines = [reason]
        if others:
            lines.append(f"{len(self.reasons):,} of the {self.rows:,} rows read so far are bad; the next are")
            lines += [f"  {other_file}:{other_line}: {other_reason}" for other_file, other_line, other_reason in others]
        lines.append("Correct them, or set `on_bad_row: skip` to go on without them; rows.jsonl then lists each.")
        return DataError("\n".join(lines), file=file, line=line)

    def prepared_data(self) -> PreparedData:
        for file, rows in zip(self.files, self._rows_of_file, strict=True):
            if not rows:
                raise DataError("this file holds no row, expected one example a line", file=file)
        if not self.samples:
            first = min(self.reasons)
            file, line = self._place(first)
            raise DataError(f"all {self.rows:,} rows are bad; the first: {self.reasons[first]}", file=file, line=line)
        return PreparedData(
            files=self.files,
            content_hash=self._hash.hexdigest(),
            shards=self._shards,
            reasons=self.reasons,
            # One by one, so that what is joined is freed before the next is.
            **{name: np.concatenate(self._columns.pop(name)) for name in list(self._columns)},
        )

    def _place(self, row: int) -> tuple[str, int]:
        lines, files = self._columns["row_line"], self._columns["row_file"]
        for block_lines, block_files in zip(lines, files, strict=True):
            if row < len(block_lines):
                return self.files[block_files[row]], int(block_lines[row])
            row -= len(block_lines)
        raise IndexError(row)


def _make_cache(directory: Path) -> None:
    """Make the directory, and remove what killed runs left half-written in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".*.tmp"):
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                leftover.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable_cache(directory, error) from None
