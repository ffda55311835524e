"""Turns ctrl-C and SIGTERM into a wish to stop after the current step, so that a checkpoint can be written first."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

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
