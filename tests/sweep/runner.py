"""Runs the stages of many architectures, each in a process of its own with a time limit, two at a time."""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 - as pyarrow and pydantic: once for all forks, instead of in each
import pyarrow.parquet  # noqa: F401
import pydantic  # noqa: F401
import torch
import transformers

from sweep import probe

SECONDS = 90  # for one stage
# One line of what a stage found, or why it was given up.
STAGES: tuple[tuple[str, Callable[..., None]], ...] = (
    ("plain transformers", probe.plain),
    ("llmforge", probe.product),
    ("reload", probe.reload),
)


@dataclass(frozen=True)
class Outcome:
    """How far an architecture came: the stage that failed, None where all passed, and why; llmforge's notes.

    `no_answers` says why plain transformers cannot generate with what it trains, where that is so.
    """

    model_type: str
    stage: str | None
    why: str
    notes: tuple[str, ...]
    seconds: float
    no_answers: str = ""


def sweep(model_types: Sequence[str], tokenizer: Path, *, processes: int = 2) -> Iterator[Outcome]:
    """Probe architectures and give each outcome when it is known.

    Args:
        tokenizer: a directory with a small tokenizer that has a chat template.
    """
    torch.set_num_threads(1)
    waiting, running = list(model_types), {}
    with tempfile.TemporaryDirectory() as directory:
        while waiting or running:
            while waiting and len(running) < processes:
                model_type = waiting.pop(0)
                place = Path(directory) / model_type
                place.mkdir()
                process = _fork(lambda model_type=model_type, place=place: _all_stages(model_type, place, tokenizer))
                running[process] = (model_type, place, time.monotonic())
            process, _ = os.wait()
            model_type, place, began = running.pop(process)
            found = place / "outcome.json"
            stage, why = json.loads(found.read_text()) if found.is_file() else ("the sweep", "its process died")
            notes = place / "lora.notes"
            heard = tuple(json.loads(notes.read_text())) if notes.is_file() else ()
            mute = place / probe.NO_ANSWERS
            no_answers = mute.read_text()[:400] if mute.is_file() else ""
            yield Outcome(model_type, stage, why, heard, time.monotonic() - began, no_answers)
            shutil.rmtree(place)


def _all_stages(model_type: str, place: Path, tokenizer: Path) -> None:
    """Run the stages one after the other, each in a fork of its own; writes which failed, and why."""
    outcome: tuple[str | None, str] = (None, "")
    for name, stage in STAGES:
        arguments = (place, model_type, tokenizer) if stage is probe.plain else (place,)
        why = _run_stage(stage, arguments, place / "why.txt")
        if why:
            outcome = (name, why)
            break
    (place / "outcome.json").write_text(json.dumps(outcome))


def _run_stage(stage: Callable[..., None], arguments: tuple, report: Path) -> str:
    def run() -> None:
        signal.alarm(SECONDS)
        log = os.open(report.with_name(f"{stage.__name__}.log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            stage(*arguments)
        except BaseException as error:
            report.write_text(_one_line(error))
            if os.environ.get("SWEEP_TRACE"):
                Path(os.environ["SWEEP_TRACE"], report.parent.name).write_text(traceback.format_exc())

    process = _fork(run)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"not done after {SECONDS} s" if number == signal.SIGALRM else f"ended by {signal.Signals(number).name}"
    return report.read_text() if report.is_file() else ""


def _fork(work: Callable[[], None]) -> int:
    """Run something in a copy of this process; gives its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    if not isinstance(error, probe.FailedError) and not type(error).__module__.startswith("llmforge"):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{name}: {text} ({Path(frame.filename).name}:{frame.lineno})"
    return text[:400]


def version() -> str:
    """Name the transformers whose architectures are swept."""
    return transformers.__version__
