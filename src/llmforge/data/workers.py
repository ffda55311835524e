"""Worker processes that call one function on what they are sent.

They differ from a multiprocessing pool in two ways that matter to a library. They never import the caller's main
module, so a script or notebook without an `if __name__ == "__main__"` guard may start them. And they end when their
parent does, also when it is killed, because they live on its pipe. The function must be importable by name, not defined
in `__main__`.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeVar

from llmforge.errors import RunError

Job = TypeVar("Job")
Answer = TypeVar("Answer")


class Workers(Generic[Job, Answer]):
    """Start `count` processes, give each job to the next idle one, and kill them on exit.

    An exception in a worker is raised by the job's future. A worker that dies (of memory, most often) is a RunError.
    """

    def __init__(self, count: int, function: Callable[[Job], Answer]) -> None:
        self._function = pickle.dumps(function)
        self._workers = [_Worker() for _ in range(count)]
        self._idle = queue.SimpleQueue[_Worker]()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count)  # one waits for each worker, so an idle worker is always there

    def submit(self, job: Job) -> Future[Answer]:
        """Queue a job."""
        return self._threads.submit(self._ask, job)

    def __enter__(self) -> "Workers[Job, Answer]":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.process.kill()  # which also frees the thread that waits for it
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.close()

    def _ask(self, job: Job) -> Answer:
        worker = self._idle.get()
        try:
            if not worker.has_function:
                worker.ask(self._function)
                worker.has_function = True
            return worker.ask(pickle.dumps(job))
        finally:
            self._idle.put(worker)


class _Worker:
    def __init__(self) -> None:
        # The path as it is now, so that the worker finds what this process finds; before any import of ours.
        start = f"import sys; sys.path[:] = {sys.path!r}; from llmforge.data.workers import serve; serve()"
        # There is one process per core already; a tokenizer's own threads would only get in each other's way.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", start]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.has_function = False

    def ask(self, message: bytes) -> Any:
        """Send a pickled message and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(len(message).to_bytes(8, "little") + message)
            self.process.stdin.flush()
            answer, error = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self.process.wait()
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise RunError(f"a worker process {how}; if memory ran out, set a smaller data_workers") from None
        if error is not None:
            raise error
        return answer

    def close(self) -> None:
        """Reap a process that was killed."""
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # half a job for a process that is gone
                pipe.close()


def serve() -> None:
    """Be a worker: read a function, then jobs, and answer each, until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the parent decides what it means
    jobs = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the function prints must not look like an answer
    function: Callable[[Any], Any] | None = None
    while header := jobs.read(8):
        answer, failure = None, None
        try:
            message = pickle.loads(jobs.read(int.from_bytes(header, "little")))
            if function is None:
                function = message
            else:
                answer = function(message)
        except Exception as error:
            failure = portable(error)
        try:
            pickle.dump((answer, failure), answers)
            answers.flush()
        except BrokenPipeError:
            os._exit(1)  # the parent died; a normal exit would complain about the pipe


def portable(error: Exception) -> Exception:
    """Return the error with its trace as a note, or a RuntimeError with the same text where it cannot be pickled."""
    error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
