"""Proves on a config of one's own that a killed run, resumed, computes what a run computes that never stopped.

Processes of their own train the run's first steps: one without a stop; one that SIGKILL ends at a random moment, with
all that it started; one that resumes it. On several devices a worker is killed before, and Ray starts again. They are
the real run, with its schedule and its data, and stop early as ctrl-C would stop it. This module starts and kills them
and compares what they leave; how to train and to resume is not its business.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from llmforge.atomic import output_error
from llmforge.bucket import bucket_url
from llmforge.config import LoadedConfig, derive, load_config, refuse_unavailable
from llmforge.errors import InputError, Interrupted, LlmforgeError, RunError
from llmforge.jobs.events import EventTail, read_events, redact
from llmforge.jobs.process_tree import ProcessTree
from llmforge.jobs.run_directory import RunDirectory
from llmforge.train.reporter import Unheard

if TYPE_CHECKING:
    from llmforge.checkpoint import Checkpoint

_CHECKPOINTS = 3  # in these steps
_ATTEMPTS = 4
_SECONDS_BETWEEN_LOOKS = 0.002
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
class Kill:
    """A kill that the run outlived.

    `after_step` is the last step that was finished by then, `seconds_later` how long that had been so, or its
    checkpoint been written; `resumed_from` is the step of the checkpoint that the run went on from (0: from the
    beginning).
    """

    killed: Literal["everything", "a worker"]
    after_step: int
    seconds_later: float
    resumed_from: int


@dataclass(frozen=True)
class Verification:
    """What came out.

    `repeatable` is False where two runs that nothing stopped differ too, and None where that was not tried, because
    there was nothing to explain. `kept` is where the runs lie, if they do.
    """

    steps: int
    kills: list[Kill]
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
        lines = []
        for kill in self.kills:
            resumed = f"from the checkpoint of step {kill.resumed_from}" if kill.resumed_from else "from the beginning"
            lines.append(
                f"killed {kill.killed} {kill.seconds_later:.3f} s after step {kill.after_step} of {self.steps}, "
                f"resumed {resumed}"
            )
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
    with _workplace(_parent(loaded), keep) as place:
        shared = [
            *overrides,
            f"output_dir={json.dumps(str(place))}",
            f"checkpoint_and_evaluation_frequency={json.dumps({'unit': 'steps', 'frequency': every})}",
            "num_checkpoints_to_keep=1",
            "checkpoint_every_n_epochs=null",  # the old spellings of the same
            "max_num_checkpoints=null",
            "logger=null",
        ]

        def start(tag: str, aims: Sequence[_Aim] = ()) -> tuple[RunDirectory, list[_Aim]]:
            run = RunDirectory.at(place, tag)
            request = {"config": str(config), "overrides": [*shared, f"custom_model_tag={tag}"], "steps": steps}
            return run, _train(request, run, aims)

        say(f"training {steps} steps without a stop")
        whole, _ = start("uninterrupted")
        reached = _last_step(whole)
        if reached < 2:
            raise InputError(f"{config} describes a run of one step; there is nothing in it to kill and to resume")
        first = min(every, reached - 1)  # where there is a checkpoint by then, if the run has so many steps
        last = max(first, reached - 2)  # not the last one, which may be too short a time

        def aim(killed: Literal["everything", "a worker"], step: int, attempt: int) -> _Aim:
            # Somewhere in what follows it: evaluation and checkpoint, where they come next, and the update after it.
            moment = random.random() * (_seconds(whole, step, "evaluation") + _seconds(whole, step + 1, "step"))
            return _Aim(killed, step, moment / (attempt + 1))

        for attempt in range(_ATTEMPTS):
            step = random.randint(first, last)
            aims = [aim("everything", step, attempt)]
            if loaded.config.num_devices > 1 and loaded.config.max_failures > 0:
                aims.insert(0, aim("a worker", random.randint(first, (first + step) // 2), attempt))
            aims[0] = replace(aims[0], event="checkpoint" if aims[0].step == every else "step")
            say(f"training them again, to be killed after {' and '.join(f'step {aim.step}' for aim in aims)}")
            killed, kills = start(f"killed-{attempt}", aims)
            if kills[-1:] == aims[-1:] and _last_step(killed) < reached:
                break
            say("it was over before it could be killed")
            shutil.rmtree(killed.path)
        else:
            raise RunError(f"{_ATTEMPTS} runs were over before they could be killed; give more steps with --steps")
        say("resuming it")
        _train({"resume": str(killed.path), "steps": steps}, killed)
        checks = compare_runs(whole, killed)
        repeatable = None
        if any(check.different for check in checks):
            say("something differs; training once more without a stop, to see whether that comes out the same")
            repeatable = not any(check.different for check in compare_runs(whole, start("again")[0]))
        return Verification(
            steps=reached,
            kills=_outlived(killed, kills),
            checks=checks,
            repeatable=repeatable,
            seconds=round(time.monotonic() - began, 1),
            kept=place if keep else None,
        )


# --- the processes that train -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Aim:
    """What to kill, and when: some seconds after `event` told of this step, or of a later one."""

    killed: Literal["everything", "a worker"]
    step: int
    seconds: float
    event: Literal["step", "checkpoint"] = "step"


def _train(request: Mapping[str, Any], run: RunDirectory, aims: Sequence[_Aim] = ()) -> list[_Aim]:
    """Have a process train, and wait until it ends or `aims` have killed it; return those that came.

    Raises what it failed with; being killed as requested is no failure.
    """
    # The path as it is now, so that the process finds what this one finds.
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from llmforge.jobs.verify_resume import train_first_steps; train_first_steps(sys.argv[1])"
    )
    events = EventTail(run.events)
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=noise,
            start_new_session=True,  # out of ctrl-C's reach, which would only stop the step
        )
        tree = ProcessTree(process)
        try:
            kills = _carry_out(aims, events, tree, process)
            while process.poll() is None:  # so that all of its processes are known, should this one be interrupted
                tree.look()
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except BaseException:
            tree.kill()
            raise
        tree.wait()
        if process.returncode == 0 or (process.returncode == -signal.SIGKILL and kills):
            return kills
        message = _text(said) or _text(noise)[-2000:] or f"a process ended with {process.returncode}, without a word"
    raise (InputError if process.returncode == InputError.exit_code else RunError)(message)


def _carry_out(
    aims: Sequence[_Aim], events: EventTail, tree: ProcessTree, process: "subprocess.Popen[bytes]"
) -> list[_Aim]:
    """Kill as the aims say, one after the other, while the process lives; return those that came."""
    kills: list[_Aim] = []
    for aim in aims:
        started = not kills  # behind a kill the run starts again first
        came = False
        while not came:
            if process.poll() is not None:
                return kills
            tree.look()
            for event in events.new():
                started = started or event["event"] == "restarted"
                came = came or (started and event["event"] == aim.event and event["step"] >= aim.step)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        time.sleep(aim.seconds)
        if aim.killed == "everything":
            tree.kill()
        elif workers := tree.workers():
            random.choice(workers).kill()
        else:
            continue  # the cluster was there before, and its processes are not this program's
        kills.append(aim)
    return kills


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()


def train_first_steps(request: str) -> None:
    """Be such a process: start a run, or resume one, train to the step that is asked for, and end.

    What goes wrong is said on stdout, alone there, and the exit code is the error's.
    """
    asked: dict[str, Any] = json.loads(request)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from llmforge.jobs.finetune import finetune, resume
    from llmforge.jobs.imports import imports_for_good

    options: dict[str, Any] = {"stop_after": asked["steps"], "importing": imports_for_good}
    try:
        if "resume" in asked:
            resume(Path(asked["resume"]), _Nobody(), **options)
        else:
            finetune(load_config(asked["config"], asked["overrides"]), _Nobody(), **options)
    except Interrupted:
        pass
    except LlmforgeError as error:
        print(redact(str(error)), file=answers, flush=True)
        sys.exit(error.exit_code)


class _Nobody(Unheard):
    """Hears nothing; all of it is in the run's events."""

    def progress(self, rows_done: int) -> None:
        """Do nothing."""


def _parent(loaded: LoadedConfig) -> Path:
    """Give the directory to work in: where runs are written, or for runs in a bucket, where their copies are."""
    config = loaded.config
    place = config.output_dir if bucket_url(config.output_dir) is None else config.cache_dir or derive.cache_dir().value
    return Path(place).expanduser().resolve()


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
    """Compare two runs: the state after their last step, every record of every step on the way, and the artifact."""
    from llmforge.checkpoint import list_checkpoints, read_optimizer_state, read_parameters

    theirs, ours = (list_checkpoints(run.checkpoints)[-1] for run in (expected, found))

    def contents(name: str, unit: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Check:
        names = sorted(first.keys() | second.keys())
        return Check(name, len(names), unit, [key for key in names if not _same(first.get(key), second.get(key))])

    def state(name: str, unit: str, read: "Callable[[Checkpoint], Mapping[str, Any]]") -> Check:
        return contents(name, unit, read(theirs), read(ours))

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
        records("evaluations", "steps", "evaluation", ("eval_loss",)),
        contents("artifact", "tensors", *(_artifact_weights(run) for run in (expected, found))),
    ]
    return [check for check in checks if check.count]  # without validation data, or before a run's end, some have none


def _artifact_weights(run: RunDirectory) -> dict[str, Any]:
    """Read the weights of a run's artifact; none where there is no artifact yet."""
    from safetensors.torch import load_file

    files = sorted(run.artifact.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


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


def _outlived(run: RunDirectory, kills: Sequence[_Aim]) -> list[Kill]:
    """Say of each kill how far the run was, and what it went on from: every start but the first comes behind one."""
    finished, starts = 0, []
    for event in read_events(run.events):
        if event["event"] == "step":
            finished = event["step"]
        elif event["event"] == "started":
            starts.append((finished, event["resumed_from"] or 0))
    return [
        Kill(aim.killed, finished, round(aim.seconds, 3), resumed_from)
        for aim, (finished, resumed_from) in zip(kills, starts[1:], strict=False)
    ]


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
