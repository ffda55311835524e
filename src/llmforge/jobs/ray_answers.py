"""Answers conversations on several devices: workers of Ray Data, each of which loads the model once."""

import logging
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from llmforge.data.workers import portable
from llmforge.errors import InputError, RunError
from llmforge.jobs.generate import Answerer, ConversationPlaceError, Work, note
from llmforge.jobs.ray_cluster import connected, require_ray

_SHARE = 4  # batches of a worker that travel together: its engine is never without work, and a lost one is soon redone
_RETRIES = 3  # of a batch whose process or node died
# A row is an answer, or what went wrong.
_DONE = pa.schema({"place": pa.int64(), "answer": pa.string(), "failure": pa.binary()})


def answers_on_ray(work: Work, conversations: Sequence[Any], num_devices: int) -> Iterator[tuple[int, str]]:
    """Answer conversations in `num_devices` processes; gives each one's place with its answer when it is ready.

    Every node has to see the run at the same path, or in a bucket.

    Raises:
        InputError: Ray is not installed, no cluster answers, or it has fewer devices.
        RunError: a process died again and again.
    """
    require_ray("--num-devices: several devices are processes of Ray Data")
    import ray

    with connected(note=note, cpus_of_own=max(num_devices, os.cpu_count() or 1)):
        there = ray.cluster_resources()
        kind = "GPU" if there.get("GPU") else "CPU"
        if there.get(kind, 0) < num_devices:
            raise InputError(f"--num-devices: given {num_devices}; the cluster has {there.get(kind, 0):g} {kind}s")
        needs = {"num_cpus": max(1, int(there.get("CPU", 1) // num_devices)), "num_gpus": int(kind == "GPU")}
        try:
            for row in _rows(work, conversations, num_devices, needs):
                if row["failure"] is not None:
                    raise pickle.loads(row["failure"])
                yield row["place"], row["answer"]
        except ray.exceptions.RayError as error:
            raise RunError(
                f"processes of Ray died while they answered ({type(error).__name__}: "
                f"{next(iter(str(error).splitlines()), '')}); what was answered is kept, and the same command continues"
            ) from error


def _rows(
    work: Work, conversations: Sequence[Any], num_devices: int, needs: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of every step of its own
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # so that an answer comes when it is ready
    size = work.batch_size * _SHARE
    tables = [
        pa.table(
            {
                "place": list(range(start, min(start + size, len(conversations)))),
                "messages": [pickle.dumps(messages) for messages in conversations[start : start + size]],
            }
        )
        for start in range(0, len(conversations), size)
    ]
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # max_task_retries has no successor yet
        dataset = ray.data.from_arrow(tables).map_batches(
            _Worker,
            batch_format="pyarrow",
            batch_size=None,
            fn_constructor_args=(work,),
            compute=ray.data.ActorPoolStrategy(size=num_devices),
            **needs,
            max_task_retries=_RETRIES,
        )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


class _Worker:
    """Answers batches of conversations; lives in a process of the cluster."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._answerer: Answerer | None = None

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        places = batch["place"].to_pylist()
        try:
            self._answerer = self._answerer or Answerer(self._work)
            for place, answer in self._answerer.answer([pickle.loads(row) for row in batch["messages"].to_pylist()]):
                yield _row(place=places[place], answer=answer)
        except ConversationPlaceError as error:
            yield _row(failure=pickle.dumps(ConversationPlaceError(places[error.place], error.reason)))
        except Exception as error:
            yield _row(failure=pickle.dumps(portable(error)))


def _row(**columns: Any) -> pa.Table:
    return pa.Table.from_pylist([{"place": None, "answer": None, "failure": None, **columns}], _DONE)
