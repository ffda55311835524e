"""Proves on a config of one's own that a killed run, resumed, computes what a run computes that never stopped.

Processes of their own train the run's first steps: one without a stop; one that SIGKILL ends at a random moment; one
that resumes it. They are the real run, with its schedule and its data, and stop early as ctrl-C would stop it. This
module starts them and compares what they leave; how to train and to resume is not its business.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmforge.atomic import output_error
from llmforge.config import load_config, refuse_unavailable
from llmforge.errors import InputError, Interrupted, LlmforgeError, RunError
from llmforge.jobs.events import read_events, redact
from llmforge.jobs.run_directory import RunDirectory

if TYPE_CHECKING:
    from llmforge.checkpoint import Checkpoint

_CHECKPOINTS = 3  # in these steps
_ATTEMPTS = 4
_LOSSES = ("train_loss", "learning_rate", "grad_norm")
_DATA = ("epoch", "examples", "tokens", "trained_tokens")


@dataclass(frozen=True)
class Check:
    """What was compared: `count` of `unit`, and the names of those that are not the same, bit for bit."""

    name: str
    count: int
    unit: str
    different: list[str]


@dataclass(frozen=True)
class Verification:
    """What came out.

    `killed_after_step` is the last step that the killed process had finished, `resumed_from` that of the checkpoint it
    was resumed from (0: from the beginning). `repeatable` is False where two runs that nothing stopped differ too, and
    None where that was not tried, because there was nothing to explain. `kept` is where the runs lie, if they do.
    """

    steps: int
    killed_after_step: int
    seconds_into_next_step: float
    resumed_from: int
    checks: list[Check]
    repeatable: bool | None
    seconds: float
    kept: Path | None

    @property
    def identical(self) -> bool:
        """Whether nothing differed."""
        return not any(check.different for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Give it as plain data."""
        return {
            "identical": self.identical,
            **asdict(self),
            "kept": None if self.kept is None else str(self.kept),
        }

    def lines(self) -> list[str]:
        """Give a table and the verdict, for a person."""
        resumed = f"from the checkpoint of step {self.resumed_from}" if self.resumed_from else "from the beginning"
        lines = [
            f"killed {self.seconds_into_next_step:.3f} s after step {self.killed_after_step} of {self.steps}, "
            f"resumed {resumed}"
        ]
        for check in self.checks:
            result = "the same, bit for bit"
            if check.different:
                shown = ", ".join(check.different[:3])
                result = f"{len(check.different):,} DIFFER: {shown}{', …' if len(check.different) > 3 else ''}"
            lines.append(f"  {check.name:<16} {f'{check.count:,} {check.unit}':<14} {result}")
        if self.identical:
            lines.append(f"proven: resuming is the same as never having stopped ({self.seconds:.0f} s)")
        elif self.repeatable is False:
            lines.append(
                "NOT the same; but two runs that nothing stopped differ as well, so it is not for resuming: this model "
                "does not compute the same twice on this device"
            )
        else:
            lines.append("NOT the same: resuming changed the run")
        if self.kept is not None:
            lines.append(f"the runs are kept in {self.kept}")
        return lines


def verify_resume(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    steps: int = 6,
    keep: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Train the first `steps` (at least 2) updates of a run twice, once killed and resumed, and compare bit for bit.

    Works in a directory of its own in the config's output_dir, which is deleted unless it is to be kept. The run's
    tracking service hears nothing of it. `say` is told what happens.

    Raises:
        InputError: the config, its data or its model cannot be used.
        RunError: training failed, or was over before it could be killed.
    """
    began = time.monotonic()
    loaded = load_config(config, overrides)
    refuse_unavailable(loaded)
    every = max(1, steps // _CHECKPOINTS)
    with _workplace(Path(loaded.config.output_dir).expanduser().resolve(), keep) as place:
        shared = [
            *overrides,
            f"output_dir={json.dumps(str(place))}",
            f"checkpoint_and_evaluation_frequency={json.dumps({'unit': 'steps', 'frequency': every})}",
            "num_checkpoints_to_keep=1",
            "checkpoint_every_n_epochs=null",  # the old spellings of the same
            "max_num_checkpoints=null",
            "logger=null",
        ]

        def start(tag: str, **more: Any) -> RunDirectory:
            _train(config=str(config), overrides=[*shared, f"custom_model_tag={tag}"], steps=steps, **more)
            return RunDirectory.at(place, tag)

        say(f"training {steps} steps without a stop")
        whole = start("uninterrupted")
        reached = _last_step(whole)
        if reached < 2:
            raise InputError(f"{config} describes a run of one step; there is nothing in it to kill and to resume")
        first = min(every, reached - 1)  # where there is a checkpoint by then, if the run has so many steps
        killed, moment = None, 0.0
        for attempt in range(_ATTEMPTS):
            step = random.randint(first, max(first, reached - 2))  # not the last one, which may be too short a time
            # Somewhere in what follows it: evaluation and checkpoint, where they come next, and the update after it.
            moment = random.random() * (_seconds(whole, step, "evaluation") + _seconds(whole, step + 1, "step"))
            moment = moment / (attempt + 1)
            say(f"training them again, to be killed after step {step}")
            killed = start(f"killed-{attempt}", kill_after=step, kill_in=moment, kill_at_checkpoint=step == every)
            done = _last_step(killed)
            if done < reached:
                break
            say("it was over before it could be killed")
            shutil.rmtree(killed.path)
        else:
            raise RunError(f"{_ATTEMPTS} runs were over before they could be killed; give more steps with --steps")
        assert killed is not None
        say("resuming it")
        _train(resume=str(killed.path), steps=steps)
        checks = compare_runs(whole, killed)
        repeatable = None
        if any(check.different for check in checks):
            say("something differs; training once more without a stop, to see whether that comes out the same")
            repeatable = not any(check.different for check in compare_runs(whole, start("again")))
        return Verification(
            steps=reached,
            killed_after_step=done,
            seconds_into_next_step=round(moment, 3),
            resumed_from=_events(killed, "started")[-1]["resumed_from"] or 0,
            checks=checks,
            repeatable=repeatable,
            seconds=round(time.monotonic() - began, 1),
            kept=place if keep else None,
        )


# --- the processes that train -----------------------------------------------------------------------------------------


def _train(**request: Any) -> None:
    """Have a process train, and wait for it. Raises what it failed with; being killed as requested is no failure."""
    # The path as it is now, so that the process finds what this one finds.
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from llmforge.jobs.verify_resume import train_first_steps; train_first_steps(sys.argv[1])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a group to be killed as one, and out of ctrl-C's reach: it would only stop the step
    )
    try:
        said, noise = process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if process.returncode == 0 or (process.returncode == -signal.SIGKILL and "kill_after" in request):
        return
    message = said.strip() or noise.strip()[-2000:] or f"a process ended with {process.returncode}, without a word"
    raise (InputError if process.returncode == InputError.exit_code else RunError)(message)


def train_first_steps(request: str) -> None:
    """Be such a process: start a run, or resume one, train to the step that is asked for, and end.

    What goes wrong is said on stdout, alone there, and the exit code is the error's.
    """
    asked: dict[str, Any] = json.loads(request)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from llmforge.jobs.finetune import finetune, resume
    from llmforge.jobs.imports import imports_for_good

    audience = _Stopping(**{key: asked[key] for key in asked.keys() - {"config", "overrides", "resume"}})
    try:
        if "resume" in asked:
            resume(Path(asked["resume"]), audience, importing=imports_for_good)
        else:
            finetune(load_config(asked["config"], asked["overrides"]), audience, importing=imports_for_good)
    except Interrupted:
        pass
    except LlmforgeError as error:
        print(redact(str(error)), file=answers, flush=True)
        sys.exit(error.exit_code)


class _Stopping:
    """Watches a run, to stop it after `steps` as ctrl-C does; or to kill it, some seconds after an event."""

    def __init__(
        self, steps: int, kill_after: int | None = None, kill_in: float = 0.0, kill_at_checkpoint: bool = False
    ) -> None:
        self._steps, self._kill_after, self._kill_in = steps, kill_after, kill_in
        self._deadly = "checkpoint" if kill_at_checkpoint else "step"

    def event(self, event: str, **fields: Any) -> None:
        """Stop or kill where it is time for that."""
        if event == self._deadly and fields["step"] == self._kill_after:
            threading.Timer(self._kill_in, os.killpg, (os.getpgrp(), signal.SIGKILL)).start()
        if event == "step" and fields["step"] == self._steps:
            signal.raise_signal(signal.SIGINT)

    def note(self, text: str) -> None:
        """Say nothing; it is in the run's events."""

    def progress(self, rows_done: int) -> None:
        """Say nothing."""


@contextmanager
def _workplace(output_dir: Path, keep: bool) -> Iterator[Path]:
    """Make a directory on the disk that runs are written to, and leave that as it was."""
    RunDirectory.check(output_dir, None)
    existed = output_dir.exists()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".verify-resume-", dir=output_dir))
    except OSError as error:
        raise output_error(error, output_dir) from error
    try:
        yield place
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
            if not existed:
                with suppress(OSError):
                    output_dir.rmdir()


# --- what they left ---------------------------------------------------------------------------------------------------


def compare_runs(expected: RunDirectory, found: RunDirectory) -> list[Check]:
    """Compare two runs: the state after their last step, and every record of every step on the way."""
    from llmforge.checkpoint import list_checkpoints, read_optimizer_state, read_parameters

    theirs, ours = (list_checkpoints(run.checkpoints)[-1] for run in (expected, found))

    def state(name: str, unit: str, read: "Callable[[Checkpoint], Mapping[str, Any]]") -> Check:
        first, second = read(theirs), read(ours)
        names = sorted(first.keys() | second.keys())
        return Check(name, len(names), unit, [key for key in names if not _same(first.get(key), second.get(key))])

    def records(name: str, unit: str, event: str, fields: Sequence[str]) -> Check:
        first, second = (_records(run, event, fields) for run in (expected, found))
        steps = sorted(first.keys() | second.keys())
        # A killed and resumed run has two records of some steps, and each of them must be right.
        different = [step for step in steps if {*first.get(step, ())} != {*second.get(step, ())}]
        return Check(name, len(steps), unit, [f"step {step}" for step in different])

    checks = [
        state("parameters", "tensors", read_parameters),
        state("optimizer state", "values", read_optimizer_state),
        records("losses", "steps", "step", _LOSSES),
        records("data order", "steps", "step", _DATA),
    ]
    evaluations = records("evaluations", "steps", "evaluation", ("eval_loss",))
    return [*checks, evaluations] if evaluations.count else checks


def _same(first: Any, second: Any) -> bool:
    """Tell whether two tensors, or two numbers, are the same to the last bit."""
    import torch

    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return type(first) is type(second) and first == second
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _events(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run.events) if event["event"] == kind]


def _last_step(run: RunDirectory) -> int:
    return max(event["step"] for event in _events(run, "step"))


def _seconds(run: RunDirectory, step: int, kind: str) -> float:
    """Give how long an update or an evaluation took; 0 where there was none."""
    field = "step_seconds" if kind == "step" else "seconds"
    return sum(event[field] for event in _events(run, kind) if event["step"] == step)


def _records(run: RunDirectory, kind: str, fields: Sequence[str]) -> dict[int, list[tuple[Any, ...]]]:
    """Give the values of some fields by step; several where a step was computed more than once."""
    records: dict[int, list[tuple[Any, ...]]] = {}
    for event in _events(run, kind):
        records.setdefault(event["step"], []).append(tuple(event[field] for field in fields))
    return records
