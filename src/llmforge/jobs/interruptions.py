"""Turns ctrl-C, SIGTERM and the last step that is wanted into a wish to stop after a step, with its checkpoint."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def remember_interrupts(note: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Give a question whether an interrupt came; a second one raises KeyboardInterrupt at once.

    Only a program's main thread receives signals; in any other, the answer is always no.
    """
    came = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True
        note("stopping after this step to write a checkpoint; press ctrl-C again to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, remember) for number in SIGNALS}
    try:
        yield lambda: came
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


class Progress:
    """Hears how far a run is, and wishes it to stop after the step `stop_after`; never, where that is None."""

    def __init__(self, stop_after: int | None) -> None:
        self._stop_after = stop_after
        self._step = 0

    def event(self, event: str, **fields: Any) -> None:
        """Take in which step was finished."""
        if event == "step":
            self._step = fields["step"]

    def note(self, text: str) -> None:
        """Do nothing."""

    @contextmanager
    def or_when(self, interruptions: Callable[[], AbstractContextManager[Callable[[], bool]]]) -> Iterator[Any]:
        """Give the question whether the run is to stop: because the step was reached, or for what others wish."""
        with interruptions() as interrupted:
            yield lambda: interrupted() or (self._stop_after is not None and self._step >= self._stop_after)
