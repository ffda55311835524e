"""What each worker of Ray Train runs: a plain torch program, which finds everything in the run's directory.

It is told of the other workers by torch's process group, and tells the run's directory what happens; the first one
does the telling.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmforge.atomic import write_atomically
from llmforge.errors import LlmforgeError

FAILURE = ".failure.json"  # what a worker raised on purpose
STOP = ".stop"  # while this file is there, the workers stop after their step


@dataclass(frozen=True)
class Orders:
    """What a worker is told: where the run lies, whether an unproven artifact may be published, when to stop."""

    run_dir: str
    allow_unproven: bool
    stop_after: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Give what Ray passes on."""
        return asdict(self)


def work(settings: dict[str, Any]) -> None:
    """Train as one of the workers.

    Raises:
        LlmforgeError: what any run raises; it is in the run's directory, too.
    """
    from ray import train

    context = train.get_context()
    work_as(Orders(**settings), rank=context.get_world_rank(), local_rank=context.get_local_rank())


def work_as(orders: Orders, *, rank: int, local_rank: int) -> None:
    """Train as the worker of this rank, in the process group that there is."""
    import torch

    from llmforge.jobs.finetune import train_as_worker

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    directory = Path(orders.run_dir)
    try:
        train_as_worker(
            directory,
            rank=rank,
            allow_unproven=orders.allow_unproven,
            stop_after=orders.stop_after,
            interruptions=asked_to_stop,
        )
    except LlmforgeError as error:
        failure = {"kind": type(error).__name__, "message": str(error), "worker": rank}
        write_atomically(directory / FAILURE, json.dumps(failure))
        raise


@contextmanager
def asked_to_stop(directory: Path) -> Iterator[Any]:
    """Give a question whether the run is to stop: signals reach the program that started the workers, not them."""
    yield (directory / STOP).exists
