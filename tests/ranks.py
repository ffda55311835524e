"""Runs on several ranks without Ray: processes with a gloo group, which train one run after the other."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_runs import Listener

Job = tuple[Path, Path, int | None]
"""A config, the directory to train into, and the step after which the first rank wants to stop."""


def train_as(rank: int, world_size: int, meeting: Path, jobs: Sequence[Job]) -> None:
    """Train runs as one rank, and leave what the first one reported in `reported.json`; a target for a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_SIZE": str(world_size), "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    import torch
    import torch.distributed as dist

    from llmforge.config import load_config
    from llmforge.errors import Interrupted
    from llmforge.train.prepare import prepare_run
    from llmforge.train.run import run

    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    for config, directory, stop in jobs:
        listener = Listener()
        directory.mkdir(parents=True, exist_ok=True)

        @contextmanager
        def interruptions(listener: Listener = listener, stop: int | None = stop) -> Iterator[Callable[[], bool]]:
            yield lambda: rank == 0 and stop is not None and listener.of("step", "step")[-1:] == [stop]

        try:
            run(
                prepare_run(load_config(config), listener),
                checkpoints=directory / "checkpoints",
                artifact=directory / "artifact",
                reporter=listener,
                interruptions=interruptions,
                add_documents=lambda path, result: None,
                resuming=True,
            )
        except Interrupted:
            assert stop is not None
        if rank == 0:
            (directory / "reported.json").write_text(json.dumps([*listener.events, {"notes": listener.notes}]))
        if world_size > 1:
            dist.barrier()
    if world_size > 1:
        dist.destroy_process_group()


def train_on_ranks(world_size: int, meeting: Path, jobs: Sequence[Job]) -> None:
    """Train runs on so many ranks; all ranks end, or none is left.

    A run takes 2 to 9 seconds alone on two cores, and twice that beside other tests. The first may have to build
    DeepSpeed's operators, for about a minute.
    """
    import multiprocessing
    from multiprocessing.connection import wait

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_runs", "llmforge.train.run"])
    processes = [context.Process(target=train_as, args=(r, world_size, meeting, jobs)) for r in range(world_size)]
    for process in processes:
        process.start()
    limit = 280 + 20 * len(jobs)
    end = time.monotonic() + limit
    try:
        # The first rank that fails ends the others, which would wait for it until gloo gives up.
        while running := [process for process in processes if process.is_alive()]:
            if any(process.exitcode for process in processes):
                break
            assert wait([process.sentinel for process in running], end - time.monotonic()), f"not ended in {limit} s"
        assert [process.exitcode for process in processes] == [0] * world_size
    finally:
        for process in processes:
            process.kill()
            process.join()


def reported(directory: Path, event: str, field: str) -> list[Any]:
    """Give one field of all events of a kind."""
    events = json.loads((directory / "reported.json").read_text())
    return [fields[field] for fields in events if fields.get("event") == event]
