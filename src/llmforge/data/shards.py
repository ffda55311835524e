"""A shard is one encoded block on disk: an Arrow IPC file, written whole or not at all, read through a memory map.

It has one entry per row: its line, its samples, or the reason why it has none. Loss weights are stored as runs, since
nearly all of them are long stretches of 0 or 1. A checksum tells a damaged shard from a good one.
"""

import os
import socket
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmforge.data.blocks import Block, rows_of
from llmforge.data.rows import RowEncoder, RowLayout, RowProblem
from llmforge.data.samples import Sample
from llmforge.errors import OutputError

SHARD_VERSION = 1  # part of every shard's key: raise it when a shard's content or the checks of rows change
ROWS_PER_CALL = 512
MAX_REASON = 400  # characters; an encoder may quote the content it cannot express


@dataclass(frozen=True, slots=True)
class Shard:
    """The arrays of a shard; those per token and per run lie in the memory map.

    R rows, S samples, T tokens, U runs. `*_ends` count from the start of the shard, with a 0 in front.
    """

    lines: np.ndarray  # int32 [R], from 0 at the block's start
    reasons: dict[int, str]  # row → why it has no samples
    sample_ends: np.ndarray  # int32 [R+1]
    token_ends: np.ndarray  # int32 [S+1]
    run_ends: np.ndarray  # int32 [S+1]
    input_ids: np.ndarray  # int32 [T]
    run_lengths: np.ndarray  # int32 [U]
    run_weights: np.ndarray  # float64 [U]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 [S]."""
        return np.diff(self.token_ends.astype(np.int64))

    def trained_tokens(self, context_length: int | None = None) -> np.ndarray:
        """Count the tokens of each sample that have a weight, within its first `context_length`; int64 [S]."""
        run_lengths = self.run_lengths.astype(np.int64)
        if context_length is not None:
            ends = np.cumsum(run_lengths)
            sample_starts = np.repeat(self.token_ends[:-1].astype(np.int64), np.diff(self.run_ends))
            run_lengths = np.clip(context_length - (ends - run_lengths - sample_starts), 0, run_lengths)
        counted = np.concatenate(([0], np.cumsum(run_lengths * (self.run_weights != 0))))
        return np.diff(counted[self.run_ends])

    def sample(self, index: int, length: int) -> Sample:
        """Return the first `length` tokens of a sample."""
        start = self.token_ends[index]
        runs = slice(self.run_ends[index], self.run_ends[index + 1])
        weights = np.repeat(self.run_weights[runs], self.run_lengths[runs])
        return Sample(self.input_ids[start : start + length].tolist(), weights[:length].tolist())


def encode_block(block: Block, path: Path, layout: RowLayout, encode: RowEncoder) -> None:
    """Encode a block and write its shard to `path`.

    An exception in `encode` is a bug, and surfaces with a note of the file and lines it was given. Raises OutputError
    when the shard cannot be written.
    """
    lines = array("i")
    reasons: list[str | None] = []
    samples_of_row = array("i")
    lengths = array("q")
    input_ids = array("i")
    loss_weights = array("d")

    for rows in _batches_of(rows_of(block, layout)):
        for (line, _), result in zip(rows, _encoded(rows, block, encode), strict=True):
            lines.append(line)
            samples = [] if isinstance(result, RowProblem) else result
            problem = result if isinstance(result, RowProblem) else RowProblem("the row gives no sample")
            reasons.append(None if samples else _one_line(problem.reason))
            samples_of_row.append(len(samples))
            for sample in samples:
                assert len(sample.input_ids) == len(sample.loss_weights), "an encoder owes one weight per token"
                lengths.append(len(sample.input_ids))
                input_ids.extend(sample.input_ids)
                loss_weights.extend(sample.loss_weights)

    token_ends = _ends(np.frombuffer(lengths, np.int64))
    run_starts, run_weights = _runs(np.frombuffer(loss_weights, np.float64), token_ends)
    shard = Shard(
        lines=np.frombuffer(lines, np.int32),
        reasons={row: reason for row, reason in enumerate(reasons) if reason is not None},
        sample_ends=_ends(np.frombuffer(samples_of_row, np.int32)),
        token_ends=token_ends,
        run_ends=np.searchsorted(run_starts, token_ends).astype(np.int32),
        input_ids=np.frombuffer(input_ids, np.int32),
        run_lengths=np.diff(np.append(run_starts, len(loss_weights))).astype(np.int32),
        run_weights=run_weights,
    )
    _write(shard, path)


def unwritable_cache(directory: Path, error: OSError) -> OutputError:
    """Say why shards cannot be written to `directory` and what to change."""
    return OutputError(
        f"{directory}: prepared rows cannot be written here ({error.strerror or error}); "
        "free some space on its disk, or set cache_dir to another place"
    )


def open_shard(path: Path) -> Shard:
    """Map a shard into memory, in some 0.1 ms; its checksum is not looked at."""
    return _shard(_batch(path))


@lru_cache(maxsize=1024)  # a map that is kept costs address space, neither memory nor a file descriptor
def open_cached(path: Path) -> Shard:
    """Map a shard into memory, or return the map if it is one of those used last."""
    return open_shard(path)


def is_whole(path: Path) -> bool:
    """Tell whether a shard is there and as it was written."""
    try:
        batch = _batch(path)
        batch.validate(full=True)  # before anything follows an offset
        checksum = _checksum(_shard(batch))
        return batch.schema.metadata == {b"version": str(SHARD_VERSION).encode(), b"checksum": checksum.encode()}
    except Exception:  # in a damaged file anything can be missing or of the wrong type
        return False


def _batches_of(rows: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    while batch := list(islice(rows, ROWS_PER_CALL)):
        yield batch


def _encoded(
    rows: Sequence[tuple[int, dict[str, Any] | RowProblem]], block: Block, encode: RowEncoder
) -> list[list[Sample] | RowProblem]:
    """Return a result for every row: the check's problem where there is one, else what the encoder says."""
    good = [row for _, row in rows if not isinstance(row, RowProblem)]
    try:
        encoded = encode(good) if good else []
        if len(encoded) != len(good):
            raise AssertionError(f"an encoder owes one result per row: {len(good)} rows, {len(encoded)} results")
    except Exception as error:
        first, last = block.first_line + rows[0][0], block.first_line + rows[-1][0]
        error.add_note(f"while encoding {block.file}, lines {first} to {last}")
        raise
    results = iter(encoded)
    return [row if isinstance(row, RowProblem) else next(results) for _, row in rows]


def _one_line(reason: str) -> str:
    text = " ".join(reason.encode(errors="backslashreplace").decode().split())
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"


def _ends(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)


def _runs(weights: np.ndarray, token_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each run of equal weights starts, and its weight; no run crosses two samples."""
    starts = np.ones(len(weights), bool)
    starts[1:] = weights[1:] != weights[:-1]
    starts[token_ends[token_ends < len(weights)]] = True
    run_starts = np.flatnonzero(starts)
    return run_starts, weights[run_starts]


def _write(shard: Shard, path: Path) -> None:
    sample = pa.StructArray.from_arrays(
        [
            pa.ListArray.from_arrays(shard.token_ends, shard.input_ids),
            pa.ListArray.from_arrays(shard.run_ends, shard.run_lengths),
            pa.ListArray.from_arrays(shard.run_ends, shard.run_weights),
        ],
        ["input_ids", "run_lengths", "run_weights"],
    )
    reasons = pa.array([shard.reasons.get(row) for row in range(len(shard.lines))], pa.string())
    columns = [pa.array(shard.lines), reasons, pa.ListArray.from_arrays(shard.sample_ends, sample)]
    batch = pa.record_batch(columns, ["line", "reason", "samples"])
    batch = batch.replace_schema_metadata({"version": str(SHARD_VERSION), "checksum": _checksum(shard)})

    # Two machines that share the cache may have processes of the same number.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable_cache(path.parent, error) from error


def _batch(path: Path) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(0)


def _shard(batch: pa.RecordBatch) -> Shard:
    reasons = batch["reason"]
    samples = batch["samples"]
    input_ids, run_lengths, run_weights = (samples.values.field(index) for index in range(3))
    return Shard(
        lines=batch["line"].to_numpy(),
        reasons=dict(_rejected(reasons)) if reasons.null_count < len(reasons) else {},
        sample_ends=samples.offsets.to_numpy(),
        token_ends=input_ids.offsets.to_numpy(),
        run_ends=run_lengths.offsets.to_numpy(),
        input_ids=input_ids.values.to_numpy(),
        run_lengths=run_lengths.values.to_numpy(),
        run_weights=run_weights.values.to_numpy(),
    )


def _rejected(reasons: pa.StringArray) -> Iterator[tuple[int, str]]:
    return ((row, reason) for row, reason in enumerate(reasons.to_pylist()) if reason is not None)


def _checksum(shard: Shard) -> str:
    checksum = zlib.crc32("\n".join(f"{row} {reason}" for row, reason in shard.reasons.items()).encode())
    for values in (
        shard.lines,
        shard.sample_ends,
        shard.token_ends,
        shard.run_ends,
        shard.input_ids,
        shard.run_lengths,
        shard.run_weights,
    ):
        checksum = zlib.crc32(values.data, checksum)
    return f"{checksum:08x}"
