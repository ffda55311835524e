"""Reads files as blocks, the unit of work, of caching and of memory. It judges rows, but never encodes them."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llmforge.data.files import can_be_cut, is_parquet, open_file, without_secrets
from llmforge.data.formats import in_messages_form
from llmforge.data.rows import RowLayout, RowProblem, shown
from llmforge.errors import DataError

BLOCK_BYTES = 4 * 2**20
MAX_LINE_BYTES = 64 * 2**20
MAX_PARQUET_ROWS = 16_384
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
STEP_BACK = 64 * 2**10  # bytes read at once when looking for the start of a line


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one file, as bytes: lines of JSON, or a Parquet record batch as an Arrow IPC stream.

    `first_line` counts from 1 (for Parquet: the row's number). `digest` depends on the content alone, so that a file
    that grew or was renamed still finds the work done for its old blocks.
    """

    kind: Literal["jsonl", "parquet"]
    file: str
    first_line: int
    content: bytes
    digest: str


class Row(NamedTuple):
    """A row in messages form, or what is wrong with it; `line` counts from 1."""

    file: str
    line: int
    content: dict[str, Any] | RowProblem


def read_blocks(file: str, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Read a file as blocks of about `block_bytes`. Raises DataError for what cannot be read, or a line above 64 MB."""
    with open_file(file) as stream:
        kind: Literal["jsonl", "parquet"] = "parquet" if is_parquet(file) else "jsonl"
        pieces = _record_batches(stream, block_bytes) if is_parquet(file) else _lines(file, stream, block_bytes)
        for first_line, content in pieces:
            yield Block(kind, without_secrets(file), first_line, content, _digest(kind, content))


def count_chunks(file: str, block_bytes: int = BLOCK_BYTES) -> int | None:
    """Return in how many chunks a file can be read, each for itself; None where it must be read from its start."""
    if not can_be_cut(file):
        return None
    with open_file(file, in_order=False) as stream:
        stream.seek(0, os.SEEK_END)
        beyond_head = max(0, stream.tell() - len(BYTE_ORDER_MARK))
    return math.ceil(beyond_head / block_bytes) + 1  # the last holds what follows the last newline


def read_chunk(file: str, number: int, block_bytes: int = BLOCK_BYTES) -> Block | None:
    """Read the block that ends in chunk `number` (from 0) of a file, without what stands before it.

    It is a block that `read_blocks` gives, but for its `first_line`, which is 1: nobody has counted the lines before
    it. None if no block ends there. Raises DataError as `read_blocks` does.
    """
    with open_file(file, in_order=False) as stream:
        stream.seek(0, os.SEEK_END)
        begin = min(len(BYTE_ORDER_MARK) + number * block_bytes, stream.tell())
        stream.seek(begin)
        chunk = _read_fully(stream, block_bytes)
        whole, newline, _ = chunk.rpartition(b"\n")
        if chunk and not newline:
            return None
        content = b"".join((_line_before(file, stream, begin), whole, newline))
    return Block("jsonl", without_secrets(file), 1, content, _digest("jsonl", content)) if content else None


def read_rows(files: Iterable[str], layout: RowLayout) -> Iterator[Row]:
    """Read the rows of files in order, in messages form; nothing is cached and problems are not raised."""
    for file in files:
        for block in read_blocks(file):
            for line, content in rows_of(block, layout):
                yield Row(block.file, block.first_line + line, content)


def rows_of(block: Block, layout: RowLayout) -> Iterator[tuple[int, dict[str, Any] | RowProblem]]:
    """Yield each row of a block with its line, 0 being the block's first. Blank lines count, but are no rows."""
    if block.kind == "parquet":
        with pa.ipc.open_stream(block.content) as batches:
            for line, row in enumerate(batches.read_next_batch().to_pylist()):
                yield line, in_messages_form(row, layout)
        return
    for line, text in enumerate(block.content.split(b"\n")):
        if text.strip():
            row = _json(text)
            yield line, row if isinstance(row, RowProblem) else in_messages_form(row, layout)


def _json(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        return RowProblem(
            f"not UTF-8: byte 0x{text[error.start]:02x} at position {error.start + 1}, expected UTF-8 text"
        )
    except json.JSONDecodeError as error:
        near = shown(error.doc[max(0, error.pos - 10) : error.pos + 30].strip())
        hint = " (`jq -c '.[]'` writes a JSON list that way)" if text.lstrip().startswith(b"[") else ""
        return RowProblem(
            f"not JSON: {error.msg} at column {error.colno}, near {near}; expected one object a line{hint}"
        )
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of more digits than Python converts
        return RowProblem(f"not JSON that can be read: {shown(str(error))}, expected one object a line")


def _too_long() -> str:
    return f"is longer than {MAX_LINE_BYTES // 2**20} MB, expected one JSON object a line"


def _digest(kind: str, content: bytes) -> str:
    return hashlib.blake2b(kind.encode() + b"\0" + content, digest_size=20).hexdigest()


def _lines(file: str, stream: IO[bytes], block_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Cut at the last newline before each multiple of `block_bytes`, so that the cuts depend on the content alone."""
    line = 1
    rest = _read_fully(stream, len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
    while chunk := _read_fully(stream, block_bytes):
        whole, newline, rest_of_chunk = chunk.rpartition(b"\n")
        if newline:
            content = b"".join((rest, whole, newline))
            yield line, content
            line += content.count(b"\n")
            rest = rest_of_chunk
        else:
            rest += chunk
        if len(rest) > MAX_LINE_BYTES:
            raise DataError(
                f"this line {_too_long()}",
                file=without_secrets(file),
                line=line,
            )
    if rest:
        yield line, rest


def _line_before(file: str, stream: IO[bytes], end: int) -> bytes:
    """Return what stands between the last place before `end` where `_lines` may cut, and `end`."""
    head = len(BYTE_ORDER_MARK)
    pieces, length, start = [], 0, end
    while start > head and length <= MAX_LINE_BYTES:
        stop, start = start, max(head, start - STEP_BACK)
        stream.seek(start)
        _, newline, line = _read_fully(stream, stop - start).rpartition(b"\n")
        pieces.append(line)
        length += len(line)
        if newline:
            break
    else:
        stream.seek(0)
        pieces.append(_read_fully(stream, min(head, end)).removeprefix(BYTE_ORDER_MARK))
    before = b"".join(reversed(pieces))
    if len(before) > MAX_LINE_BYTES:
        raise DataError(f"a line {_too_long()}; it reaches beyond byte {end:,}", file=without_secrets(file))
    return before


def _read_fully(stream: IO[bytes], size: int) -> bytes:
    """Read `size` bytes unless the stream ends; decompressors and remote files may give fewer at a time."""
    pieces = []
    while size and (piece := stream.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _record_batches(stream: IO[bytes], block_bytes: int) -> Iterator[tuple[int, bytes]]:
    # pre_buffer would hold whole row groups, which can be whole files
    parquet = pq.ParquetFile(stream, pre_buffer=False)
    groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
    size = sum(group.total_byte_size for group in groups)
    rows = max(1, min(MAX_PARQUET_ROWS, block_bytes * parquet.metadata.num_rows // max(1, size)))
    first_row = 1
    for batch in parquet.iter_batches(batch_size=rows):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield first_row, sink.getvalue().to_pybytes()
        first_row += batch.num_rows
