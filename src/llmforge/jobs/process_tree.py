"""A program and every process that it has started, to be killed as a crash or a lost machine ends them: by SIGKILL.

Workers of Ray are no children of the program's own, but of what it started; whoever kills the program first does not
find them any more. So they are looked for while it runs.
"""

import subprocess
import time
from contextlib import suppress
from typing import Any

import psutil

_SECONDS_BETWEEN_LOOKS = 0.25
_SECONDS_TO_END = 30
_WORKER = "RayTrainWorker"  # in the names that Ray gives to its processes


class ProcessTree:
    """The processes of a program, as far as they were seen."""

    def __init__(self, program: "subprocess.Popen[Any]") -> None:
        self._program = program
        self._seen: dict[int, psutil.Process] = {}
        self._looked = 0.0

    def look(self) -> None:
        """Look which processes there are, unless that was done just now."""
        if time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        with suppress(psutil.Error):
            self._seen |= {child.pid: child for child in psutil.Process(self._program.pid).children(recursive=True)}
        self._looked = time.monotonic()

    def workers(self) -> list[psutil.Process]:
        """Give the processes that train for a run on Ray; none where its cluster was there before the program."""
        return [process for process in self._seen.values() if _is_worker(process)]

    def kill(self) -> None:
        """Kill everything at once, and wait until it is gone."""
        self._program.kill()
        for process in self._seen.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait()

    def wait(self) -> None:
        """Wait until everything has ended."""
        self._program.wait()
        psutil.wait_procs(list(self._seen.values()), timeout=_SECONDS_TO_END)


def _is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return _WORKER in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    return False
