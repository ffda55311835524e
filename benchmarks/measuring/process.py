"""Runs a program as a process of its own and watches it from outside: time, memory, and the probe's log.

The probe (peers/inside/sitecustomize.py) is the same for all programs.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import IO, Any

import psutil

SAMPLES_PER_SECOND = 5
SHARED_SAMPLES_PER_SECOND = 1  # reading shared memory in full walks all page tables, which would slow the program
PATIENCE = 20  # seconds between SIGTERM and SIGKILL


@dataclass
class Peak:
    """The most memory (bytes) that a process and its children held at a time, and the main process by itself."""

    together: int = 0
    main: int = 0
    _last_shared: float = field(default=0.0, repr=False)

    def sample(self, main: psutil.Process) -> None:
        """Look once. Pages that several processes share count once."""
        try:
            processes = [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        resident = []
        for process in processes:
            try:
                resident.append(process.memory_info().rss)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                resident.append(0)
        self.main = max(self.main, resident[0], _high_water(main.pid))
        if len([size for size in resident if size]) < 2:
            self.together = max(self.together, self.main)
        elif sum(resident) > self.together and time.monotonic() - self._last_shared > 1 / SHARED_SAMPLES_PER_SECOND:
            self._last_shared = time.monotonic()
            self.together = max(self.together, sum(_proportional(process) for process in processes))


def _high_water(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass  # no Linux, or it has ended
    return 0


def _proportional(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
    return getattr(memory, "pss", memory.uss)


@dataclass
class Outcome:
    """What a process left: its exit code (None: it ran past the limit), times in s since 1970, memory and output."""

    code: int | None
    began: float
    ended: float
    peak: Peak
    log: str
    probe: list[dict[str, Any]]


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    limit: float,
) -> Outcome:
    """Run a command to its end in `directory`, which gets its output (`log.txt`) and the probe's (`probe.jsonl`)."""
    probe, log = directory / "probe.jsonl", directory / "log.txt"
    peak = Peak()
    with open(log, "wb") as output:
        began = time.time()
        process = _start(command, {**environment, "BENCH_PROBE": str(probe)}, directory, output)
        main = psutil.Process(process.pid)
        code: int | None = None
        try:
            while True:
                peak.sample(main)
                try:
                    code = process.wait(1 / SAMPLES_PER_SECOND)
                    break
                except subprocess.TimeoutExpired:
                    if time.time() - began > limit:
                        break
            ended = time.time()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    records = [json.loads(line) for line in probe.read_text().splitlines()] if probe.is_file() else []
    return Outcome(code, began, ended, peak, log.read_text(errors="replace"), records)


@dataclass
class Running:
    """A program that runs beside this one: when it began (s since 1970), its memory, and where its output goes."""

    process: subprocess.Popen[bytes]
    began: float
    peak: Peak
    log: Path


@contextmanager
def running(command: Sequence[str], *, environment: Mapping[str, str], directory: Path) -> Iterator[Running]:
    """Start a command in `directory`, watch its memory, and end it: SIGTERM, then SIGKILL if it must be."""
    log = directory / "log.txt"
    ended = threading.Event()
    with open(log, "wb") as output:
        began = time.time()
        program = Running(_start(command, environment, directory, output), began, Peak(), log)
        main = psutil.Process(program.process.pid)

        def watch() -> None:
            while not ended.wait(1 / SAMPLES_PER_SECOND):
                program.peak.sample(main)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield program
        finally:
            ended.set()
            watcher.join()
            program.process.terminate()
            try:
                program.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(program.process.pid, signal.SIGKILL)
                program.process.wait()


def _start(
    command: Sequence[str], environment: Mapping[str, str], directory: Path, output: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def steps_of(probe: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give time and cumulative counts after each optimizer step, of the process that made the most of them."""
    by_process: dict[int, list[dict[str, Any]]] = {}
    for record in probe:
        by_process.setdefault(record["pid"], []).append(dict(record))
    return max(by_process.values(), key=len, default=[])


def steady(steps: Sequence[Mapping[str, Any]], began: float) -> dict[str, float | int | None]:
    """Measure the steps after the first two, or after the first where there are fewer than six.

    The first steps are slower: memory is new, and kernels are made for each shape.
    """
    skipped = 2 if len(steps) >= 6 else 1
    result: dict[str, float | int | None] = {
        "first_step_seconds": steps[0]["time"] - began if steps else None,
        "steady_steps": max(0, len(steps) - skipped),
        "tokens_per_second": None,
        "step_seconds": None,
    }
    if len(steps) > skipped:
        first, last = steps[skipped - 1], steps[-1]
        seconds = last["time"] - first["time"]
        result["tokens_per_second"] = (last["tokens"] - first["tokens"]) / seconds
        times = [step["time"] for step in steps[skipped - 1 :]]
        result["step_seconds"] = median(b - a for a, b in pairwise(times))
    return result
