"""Writes checkpoints while training goes on: it waits for a copy of the state, not for the disk."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Thread

import psutil

from llmforge.checkpoint import (
    Checkpoint,
    State,
    best_checkpoint,
    check_finite,
    delete_superseded,
    list_checkpoints,
    save_checkpoint,
)
from llmforge.train.backends import Backend
from llmforge.train.reporter import Reporter

_ROOM = 2  # times the state in free memory; with less of it, training waits for the disk


class Saver:
    """Writes a run's checkpoints, one at a time; use as a context, which is left when all are on the disk.

    Every rank calls `save`, and those that have nothing to write are through at once.

    Args:
        last_step: the one after which training does not go on.
        keep: how many of the best to keep.
    """

    def __init__(self, directory: Path, *, backend: Backend, last_step: int, keep: int, reporter: Reporter) -> None:
        self._directory, self._backend, self._reporter = directory, backend, reporter
        self._last_step, self._keep = last_step, keep
        self._together = backend.apart()
        self._writing: Future[Checkpoint] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:  # a second ctrl-C, which is to end the program at once
            self._finish()

    def save(self, state: State, *, step: int, metrics: dict[str, float], only_to_resume: bool = False) -> None:
        """Write the state after `step` updates, behind the checkpoint before it.

        Raises:
            NonFiniteLossError: a parameter is NaN or infinite; nothing is written.
            OutputError: the disk is full or cannot be written to, or could not be for the checkpoint before.
        """
        check_finite(state, step, self._backend.total)
        self._finish()
        if self._backend.rank and not state.in_parts:
            return
        goes_on = step != self._last_step and not only_to_resume
        aside = goes_on and (state.is_copy or psutil.virtual_memory().available > _ROOM * state.bytes_here)
        write = partial(
            save_checkpoint,
            self._directory,
            step=step,
            state=state.copy() if aside else state,
            metrics=metrics,
            only_to_resume=only_to_resume,
        )
        if state.in_parts:
            together = self._together
            write = partial(write, rank=together.rank, total=together.total, group=together.group)
        self._writing = _begin(write)
        if not aside:
            self._finish()

    def settle(self) -> None:
        """Tell of the checkpoint that has been written meanwhile, if one has, and delete those that it supersedes.

        Raises:
            OutputError: it could not be written.
        """
        if self._writing is None or not self._writing.done():
            return
        written, self._writing = self._writing.result(), None
        if self._backend.rank == 0:
            existing = list_checkpoints(self._directory)
            best = best_checkpoint(existing).step == written.step
            self._reporter.event("checkpoint", step=written.step, path=str(written.path), best=best)
            delete_superseded(existing, self._keep)

    def _finish(self) -> None:
        if self._writing is not None:
            self._writing.exception()  # which waits
            self.settle()


def _begin(write: Callable[[], Checkpoint]) -> Future[Checkpoint]:
    """Run in a thread that the end of the program does not wait for."""
    written: Future[Checkpoint] = Future()

    def run() -> None:
        try:
            written.set_result(write())
        except BaseException as error:
            written.set_exception(error)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return written
