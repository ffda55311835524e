"""What each worker of Ray Train runs: a plain torch program, which finds everything in the run's directory.

It is told of the other workers by torch's process group, and tells the run's directory what happens; the first one
does the telling.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmforge.atomic import write_atomically
from llmforge.errors import LlmforgeError

FAILURE = ".failure.json"  # what a worker raised on purpose
STOP = (
    ".stop"  # while this file is there, the workers stop after their step; it says why, if its user did not ask for it
)


@dataclass(frozen=True)
class Orders:
    """What a worker is told.

    Where the run lies, for it and for a person; what is set otherwise than in the run's resolved config; whether an
    unproven artifact may be published.
    """

    run_dir: str
    place: str
    overrides: tuple[str, ...]
    allow_unproven: bool

    def as_dict(self) -> dict[str, Any]:
        """Give what Ray passes on."""
        return asdict(self)


def work(settings: dict[str, Any]) -> None:
    """Train as one of the workers.

    Raises:
        LlmforgeError: what any run raises; it is in the run's directory, too.
    """
    import ray
    from ray import train

    from llmforge.jobs.notices import notice, watch_node

    context = train.get_context()
    if context.get_local_rank() == 0:
        watch_node(ray.get_runtime_context().get_node_id())
    work_as(Orders(**settings), notice, rank=context.get_world_rank(), local_rank=context.get_local_rank())


def work_as(orders: Orders, notice: Callable[[], str | None], *, rank: int, local_rank: int) -> None:
    """Train as the worker of this rank, in the process group that there is.

    `notice` gives the reason why this worker is to go, if it is: then all stop after their step.
    """
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
            place=orders.place,
            overrides=orders.overrides,
            allow_unproven=orders.allow_unproven,
            interruptions=partial(asked_to_stop, notice),
        )
    except LlmforgeError as error:
        failure = {"kind": type(error).__name__, "message": str(error), "worker": rank}
        write_atomically(directory / FAILURE, json.dumps(failure))
        raise


@contextmanager
def asked_to_stop(notice: Callable[[], str | None], directory: Path) -> Iterator[Callable[[], bool]]:
    """Give a question whether the run is to stop, because its user asked for it or this worker got a notice."""
    stop = directory / STOP

    def asked() -> bool:
        reason = notice()
        if reason is not None and not stop.exists():
            write_atomically(stop, reason)
        return stop.exists()

    yield asked
