"""Who encodes the blocks: this process and its workers, or an executor that is handed in, such as a cluster's.

An executor decides where blocks are read and encoded, and nothing about them: the same files give the same blocks,
shards and order whoever does the work.
"""

import hashlib
import os
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Protocol

from llmforge.data.blocks import BLOCK_BYTES, Block, read_blocks
from llmforge.data.rows import RowEncoder, RowLayout
from llmforge.data.shards import SHARD_VERSION, encode_block, is_whole
from llmforge.data.workers import Workers

MIN_BLOCKS_FOR_WORKERS = 3  # fewer are encoded sooner than worker processes start


@dataclass(frozen=True, slots=True)
class ShardMaker:
    """Makes shards in `directory`; can be sent to another process.

    A shard's name is a hash of the block's content and of all that decides its encoding.
    """

    directory: Path
    layout: RowLayout
    fingerprint: str
    encode: RowEncoder
    block_bytes: int = BLOCK_BYTES

    def shard_of(self, block: Block) -> Path:
        """Return where the shard of a block is, or will be."""
        key = "\0".join((str(SHARD_VERSION), block.digest, self.layout.fingerprint, self.fingerprint))
        return self.directory / f"{hashlib.blake2b(key.encode(), digest_size=20).hexdigest()}.arrow"

    def __call__(self, block: Block) -> None:
        """Write the shard of a block. Raises what `encode_block` raises."""
        encode_block(block, self.shard_of(block), self.layout, self.encode)


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A block whose shard is there: where its rows come from, and the hash of its content."""

    file_number: int
    first_line: int
    digest: str
    shard: Path


class Executor(Protocol):
    """Reads files, and makes the shards that are not there yet."""

    def __call__(self, files: Sequence[str], maker: ShardMaker, workers: int | None) -> Generator[EncodedBlock]:
        """Give every block of the files in reading order, once its shard is there.

        `workers` is how many processes may encode; None leaves it to the executor. Raises what reading and encoding
        raise, for the first block in reading order that fails.
        """


def encode_here(files: Sequence[str], maker: ShardMaker, workers: int | None) -> Generator[EncodedBlock]:
    """Encode in `workers` processes of this machine (None: one for each core); two blocks of each are in memory."""
    work = (
        _Work.of(number, block, maker)
        for number, file in enumerate(files)
        for block in read_blocks(file, maker.block_bytes)
    )
    with closing(_finished(work, maker, _cores() if workers is None else workers)) as finished:
        for item in finished:
            yield EncodedBlock(item.file_number, item.block.first_line, item.block.digest, item.shard)


@dataclass(frozen=True, slots=True)
class _Work:
    """A block and its shard; the block's content is left out where the shard is there already."""

    file_number: int
    block: Block
    shard: Path
    is_done: bool

    @classmethod
    def of(cls, file_number: int, block: Block, maker: ShardMaker) -> "_Work":
        shard = maker.shard_of(block)
        if is_whole(shard):
            return cls(file_number, replace(block, content=b""), shard, is_done=True)
        return cls(file_number, block, shard, is_done=False)


def _finished(work: Iterator[_Work], maker: ShardMaker, count: int) -> Generator[_Work]:
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
                maker(item.block)
            yield item
        return

    waiting: deque[tuple[_Work, Future[None] | None]] = deque()
    in_flight = 0
    with Workers(count, maker) as processes:
        for item in chain(first, work):
            future = None if item.is_done else processes.submit(item.block)
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


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))  # what this process may use, not what the machine has
    return os.cpu_count() or 1
