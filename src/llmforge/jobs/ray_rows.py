"""Encodes rows on a Ray cluster: an executor for `prepare` that Ray Data runs.

What travels is small: to a process the name of a file and the number of a chunk, which it reads itself; back the name
of a shard. So the cache must lie on storage that every node shares, which is tried out first. Files that must be read
from their start (compressed, Parquet, from a web server), or that only the driver's machine has, are read there, and
their blocks travel through the object store.

This module is imported by the processes that encode: it must not import torch.
"""

import logging
import os
import pickle
import secrets
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmforge.data.blocks import Block, count_chunks, read_blocks, read_chunk
from llmforge.data.executors import MIN_BLOCKS_FOR_WORKERS, EncodedBlock, ShardMaker, encode_here
from llmforge.data.files import is_local
from llmforge.data.shards import is_whole
from llmforge.data.workers import portable
from llmforge.errors import OutputError, RunError

MAX_TASKS = 10_000  # beyond it, each gets several chunks
FILES_READ_AT_ONCE = 2  # on the driver's node; in order, so more would only fill the object store
RETRIES = 3  # of a task whose process or node died
SECONDS_TO_APPEAR = 10  # network file systems may hide a new file that long
SECONDS_TO_PROBE = 120
MINUTES_WITHOUT_PROGRESS = 30.0  # after which a cluster that stands still is given up: it would stand still for ever

# What Ray Data raises then; older versions never do.
_STANDSTILL: type[Exception] | tuple[()] = getattr(ray.data.exceptions, "ExecutionTimeoutError", ())

# A row of WORK is a chunk to read (`number`), a whole file to read (no `number`), a block, or what went wrong with one.
WORK = pa.schema({"file": pa.int32(), "number": pa.int64(), "block": pa.binary(), "failure": pa.binary()})
# A row of DONE is a shard with the block it is of, a chunk in which no block ends, or what went wrong.
DONE = pa.schema(
    {
        "file": pa.int32(),
        "first_line": pa.int64(),  # null where only `lines` is known: the lines of the blocks before add up to it
        "lines": pa.int64(),
        "digest": pa.string(),
        "shard": pa.string(),
        "node": pa.string(),
        "failure": pa.binary(),
    }
)


def encode_on_cluster(files: Sequence[str], maker: ShardMaker, workers: int | None) -> Generator[EncodedBlock]:
    """Encode in `workers` processes of the cluster this process is connected to (None: one for each of its CPUs).

    A process or node that dies is replaced and its blocks are done again; what is in the cache is never done twice.

    Raises:
        OutputError: a node does not share the cache with this machine.
        RunError: a process died again and again, the cluster is gone, or nothing happens there.
    """
    files = [os.path.abspath(file) if is_local(file) else file for file in files]
    seen_by_all = _probe(maker.directory, [file for file in files if is_local(file)])
    chunks = [
        count_chunks(file, maker.block_bytes) if not is_local(file) or file in seen_by_all else None for file in files
    ]
    if None not in chunks and sum(filter(None, chunks)) < MIN_BLOCKS_FOR_WORKERS:
        yield from encode_here(files, maker, 1)
        return

    first_line = dict.fromkeys(range(len(files)), 1)  # of the next block
    try:
        with closing(_answers(files, chunks, maker, workers)) as answers:
            for answer in answers:
                file, first = answer["file"], answer["first_line"]
                if answer["failure"] is not None:
                    raise _failure(answer["failure"], first_line[file])
                if first is None:
                    first = first_line[file]
                    first_line[file] += answer["lines"]
                if answer["shard"] is None:
                    continue
                shard = maker.directory / answer["shard"]
                if not shard.exists():
                    raise _not_shared(maker.directory, answer["node"])
                yield EncodedBlock(file, first, answer["digest"], shard)
    except ray.exceptions.RayError as error:
        raise _as_run_error(error) from error
    except _STANDSTILL as error:
        raise RunError(
            f"the Ray cluster has encoded nothing for {MINUTES_WITHOUT_PROGRESS:g} minutes. Look at `ray status`: "
            "something else may have all of its CPUs; and at its dashboard: a process may be stuck. What was done is "
            "in the cache: the same command continues"
        ) from error


class _Encoder:
    """Makes the shards of chunks and blocks; lives in a process of the cluster."""

    def __init__(self, shared: ray.ObjectRef) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
        self._files, self._maker = ray.get(shared)
        self._node = ray.util.get_node_ip_address()

    def __call__(self, work: pa.Table) -> Iterator[pa.Table]:
        for row in work.to_pylist():
            answer = {"file": row["file"], "node": self._node, "failure": row["failure"]}
            if row["failure"] is None:
                try:
                    answer |= self._make(row)
                except Exception as error:
                    answer["failure"] = _pickled(error)
            yield pa.Table.from_pylist([answer], DONE)

    def _make(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["block"] is not None:
            block: Block | None = pickle.loads(row["block"])
        else:
            block = read_chunk(self._files[row["file"]], row["number"], self._maker.block_bytes)
        if block is None:
            return {"lines": 0}
        shard = self._maker.shard_of(block)
        if not is_whole(shard):
            self._maker(block)
        place = {"first_line": block.first_line} if row["number"] is None else {"lines": block.content.count(b"\n")}
        return {"digest": block.digest, "shard": shard.name, **place}


def _answers(
    files: Sequence[str], chunks: Sequence[int | None], maker: ShardMaker, workers: int | None
) -> Generator[dict[str, Any]]:
    """Run the encoders on all files and give what they say, in reading order."""
    work = [
        {"file": file, "number": number, "block": None, "failure": None}
        for file, count in enumerate(chunks)
        for number in ([None] if count is None else range(count))
    ]
    tasks = min(len(work), MAX_TASKS)

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every step of its own
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = MINUTES_WITHOUT_PROGRESS * 60
    context.target_max_block_size = maker.block_bytes // 2 + 1  # so that each of our blocks is one of Ray's
    count = max(1, workers or int(ray.cluster_resources().get("CPU", 1)))
    if None not in chunks:
        count = min(count, tasks)
    # Once, and held here: a process that is replaced needs it again.
    shared = ray.put((list(files), maker))
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # max_task_retries has no successor yet
        # Unlike from_arrow, it runs no task for each block, which needs a free CPU and waits for it without end.
        dataset = ray.data.from_items(work, override_num_blocks=tasks)
        if None in chunks:
            dataset = dataset.map_batches(
                _read,
                batch_format="pyarrow",
                batch_size=None,
                fn_kwargs={"files": files, "block_bytes": maker.block_bytes},
                compute=ray.data.TaskPoolStrategy(size=min(FILES_READ_AT_ONCE, tasks)),
                num_cpus=0,  # it waits for disks and networks, and must not wait for the encoders to leave a core
                label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
            )
        dataset = dataset.map_batches(
            _Encoder,
            batch_format="pyarrow",
            batch_size=None,
            fn_constructor_args=(shared,),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
            num_cpus=1,
            max_task_retries=RETRIES,
        )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def _read(work: pa.Table, files: Sequence[str], block_bytes: int) -> Iterator[pa.Table]:
    """Read the files that must be read from their start; pass on what else there is to do."""
    for row in work.to_pylist():
        if row["number"] is not None:
            yield pa.Table.from_pylist([row], WORK)
            continue
        try:
            for block in read_blocks(files[row["file"]], block_bytes):
                yield pa.Table.from_pylist([{**row, "block": pickle.dumps(block)}], WORK)
        except Exception as error:
            yield pa.Table.from_pylist([{**row, "failure": _pickled(error)}], WORK)


def _probe(directory: Path, files: Sequence[str]) -> set[str]:
    """Check that every node shares `directory` with this process; return the files that every node sees."""
    token = secrets.token_hex(8)
    # Named as half-written shards are, so that what a killed run leaves is swept up with them.
    marker = directory / f".probe.{token}.tmp"
    nodes = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    }
    sizes = {file: os.stat(file).st_size for file in files}
    marker.write_text(token)
    try:
        asked = {
            node: ray.remote(_look)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            .remote(marker, token, sizes)
            for node in nodes
        }
        seen_by_all = set(files)
        for node, answer in asked.items():
            reply, seen = ray.get(answer, timeout=SECONDS_TO_PROBE)
            if reply is None or not _appears(directory / reply, token):
                raise _not_shared(directory, nodes[node])
            (directory / reply).unlink(missing_ok=True)
            seen_by_all &= seen
        return seen_by_all
    except ray.exceptions.RayError as error:
        raise _as_run_error(error) from error
    finally:
        marker.unlink(missing_ok=True)


def _look(marker: Path, token: str, sizes: dict[str, int]) -> tuple[str | None, set[str]]:
    """Look for a marker and for files on this node, and answer with a file beside the marker; None: it is not seen."""
    if not _appears(marker, token):
        return None, set()
    reply = marker.with_name(f".probe.{secrets.token_hex(8)}.tmp")
    try:
        reply.write_text(token)
    except OSError:
        return None, set()
    return reply.name, {file for file, size in sizes.items() if os.path.isfile(file) and os.stat(file).st_size == size}


def _appears(path: Path, content: str) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while True:
        try:
            if path.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline or not path.parent.is_dir():
            return False
        time.sleep(0.2)


def _not_shared(directory: Path, node: str) -> OutputError:
    return OutputError(
        f"{directory}: the node {node} of the Ray cluster does not share this directory with the driver's machine. "
        "Prepared rows go where every node can read and write: set cache_dir to a directory on shared storage (NFS, "
        "EFS, Filestore; /mnt/cluster_storage on Anyscale)"
    )


def _failure(pickled: bytes, first_line: int) -> Exception:
    """Return what went wrong in a process of the cluster, which did not know where in the file its chunk lies."""
    error: Exception = pickle.loads(pickled)
    if first_line > 1:
        error.add_note(f"(lines are counted from line {first_line} of the file)")
    return error


def _pickled(error: Exception) -> bytes:
    return pickle.dumps(portable(error))


def _as_run_error(error: ray.exceptions.RayError) -> RunError:
    """Say in short why Ray gave up."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause if isinstance(error.cause, Exception) else error
        return RunError(
            f"a process of the Ray cluster could not encode rows: {type(cause).__name__}: {cause}. Every node needs "
            "the same llmforge, transformers and ray as this machine"
        )
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return RunError(f"a node of the Ray cluster started no process within {SECONDS_TO_PROBE} s")
    return RunError(
        f"processes of the Ray cluster died while they encoded rows ({type(error).__name__}: "
        f"{next(iter(str(error).splitlines()), '')}); if memory ran out, set a smaller data_workers. What was done "
        "is in the cache: the same command continues"
    )
