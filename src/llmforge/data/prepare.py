"""Turns files into prepared data: in parallel, in bounded memory, and never the same block twice.

Each block becomes one shard in the cache, named by a hash of the block's content and of all that decides its encoding.
What is there is used; so a second run starts at once, and a killed one goes on where it was.
"""

import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from llmforge.data.blocks import BLOCK_BYTES, Block, read_blocks
from llmforge.data.dataset import PreparedData
from llmforge.data.files import without_secrets
from llmforge.data.rows import RowEncoder, RowLayout
from llmforge.data.shards import SHARD_VERSION, encode_block, is_whole, open_shard, unwritable_cache
from llmforge.data.workers import Workers
from llmforge.errors import DataError

MIN_BLOCKS_FOR_WORKERS = 3  # fewer are encoded sooner than worker processes start
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
) -> PreparedData:
    """Read, check and encode the rows of `files`, reusing the shards in `cache_dir` that fit.

    `fingerprint` names everything `encode` depends on (tokenizer, prompt format, task). `workers` counts processes;
    None means one per core. `progress` is told the number of rows done so far. At most two blocks per worker are in
    memory at a time.

    Raises DataError for a file that cannot be read or holds no row, for the first bad row under `on_bad_row="error"`,
    and when no row is good; OutputError when `cache_dir` cannot be written to. An exception in `encode` surfaces as it
    is, with a note of file and lines.
    """
    _make_cache(cache_dir)
    cache = _Cache(cache_dir, layout, fingerprint)
    index = _Index(files)
    work = (
        cache.look_up(number, block) for number, file in enumerate(files) for block in read_blocks(file, block_bytes)
    )
    run = partial(_encode, layout, encode)
    with closing(_finished(work, run, _cores() if workers is None else workers)) as finished:
        for item in finished:
            index.add(item)
            if index.reasons and on_bad_row == "error":
                raise index.bad_row_error()
            if progress is not None:
                progress(index.rows)
    return index.prepared_data()


@dataclass(frozen=True, slots=True)
class _Work:
    """A block and its shard; the block's content is left out where the shard is there already."""

    file_number: int
    block: Block
    shard: Path
    is_done: bool


@dataclass(frozen=True, slots=True)
class _Cache:
    directory: Path
    layout: RowLayout
    fingerprint: str

    def look_up(self, file_number: int, block: Block) -> _Work:
        key = "\0".join((str(SHARD_VERSION), block.digest, self.layout.fingerprint, self.fingerprint))
        shard = self.directory / f"{hashlib.blake2b(key.encode(), digest_size=20).hexdigest()}.arrow"
        if is_whole(shard):
            return _Work(file_number, replace(block, content=b""), shard, is_done=True)
        return _Work(file_number, block, shard, is_done=False)


def _encode(layout: RowLayout, encode: RowEncoder, work: _Work) -> None:
    encode_block(work.block, work.shard, layout, encode)


def _finished(work: Iterator[_Work], run: Callable[[_Work], None], count: int) -> Generator[_Work]:
    """Do what is not done, here or in `count` processes, and give every piece in reading order once it is done.

    The order makes the first bad row that is reported the first in the file, whoever met it first.
    """
    first: list[_Work] = []
    missing = 0
    while count > 1 and missing < MIN_BLOCKS_FOR_WORKERS and (item := next(work, None)):
        first.append(item)
        missing += not item.is_done
    if missing < MIN_BLOCKS_FOR_WORKERS:
        for item in chain(first, work):
            if not item.is_done:
                run(item)
            yield item
        return

    waiting: deque[tuple[_Work, Future[None] | None]] = deque()
    in_flight = 0
    with Workers(count, run) as workers:
        for item in chain(first, work):
            future = None if item.is_done else workers.submit(item)
            waiting.append((replace(item, block=replace(item.block, content=b"")), future))
            in_flight += not item.is_done
            while waiting and (in_flight == 2 * count or waiting[0][1] is None or waiting[0][1].done()):
                done, future = waiting.popleft()
                if future is not None:
                    future.result()
                    in_flight -= 1
                yield done
        for done, future in waiting:
            if future is not None:
                future.result()
            yield done


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

    def add(self, work: _Work) -> None:
        shard = open_shard(work.shard)
        rows, samples = len(shard.lines), len(shard.token_ends) - 1
        for row, reason in shard.reasons.items():
            self.reasons[self.rows + row] = sys.intern(reason)  # thousands of rows have few kinds of problem
        for name, values in (
            ("row_file", np.full(rows, work.file_number, np.int32)),
            ("row_line", shard.lines.astype(np.int64) + work.block.first_line),
            ("sample_row", np.repeat(np.arange(self.rows, self.rows + rows), np.diff(shard.sample_ends))),
            ("sample_shard", np.full(samples, len(self._shards), np.int32)),
            ("sample_index", np.arange(samples, dtype=np.int32)),
            ("lengths", shard.lengths),
            ("trained_tokens", shard.trained_tokens()),
        ):
            self._columns[name].append(values)
        self._hash.update(f"{work.file_number} {work.block.digest}\n".encode())
        self._shards.append(work.shard)
        self._rows_of_file[work.file_number] += rows
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
            **{name: np.concatenate(values) for name, values in self._columns.items()},
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


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))  # what this process may use, not what the machine has
    return os.cpu_count() or 1
