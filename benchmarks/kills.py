"""Kills fine-tuning runs at many places, has them go on, and compares them, bit for bit, with runs that nothing killed.

    make kills                                         # everything; an hour on two cores
    make kills KILLS="--configs lora,ddp --seed 1"     # some of it; the other results stay

What is killed is the real program, from outside, with SIGKILL, at random moments: in a step, while a checkpoint is
written, during an evaluation and so on. It goes on as a user's would: by itself where Ray lost a worker, else by
`llmforge finetune --resume`, or by the same command where there was no run yet. The tiny model, its data and the S3
server are those of the tests. Writes results/kills.md and kills.json.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from conftest import CORPUS, conversation_rows, save_model, write_jsonl
from faulty_store import BUCKET, CUT, Fault, FaultyStore, Request, credentials, faulty_store
from llmforge.atomic import partial_name
from llmforge.errors import LlmforgeError
from llmforge.jobs.events import EventTail, read_events
from llmforge.jobs.process_tree import ProcessTree
from llmforge.jobs.run_directory import RunDirectory
from llmforge.jobs.verify_resume import Check, compare_runs
from measuring.machine import describe
from tiny_runs import LORA, environment, tree, write_config

RESULTS = Path(__file__).parent / "results"
LIMIT = 300  # seconds for one start of the program
LOOKS = 0.001  # seconds between two looks at a run
MIDST = 0.8  # of the time that a run stays at a place: how long it stays is known only roughly
EVERY = 6  # steps from one evaluation and checkpoint to the next
UPLOADS = 40  # requests among which one is drawn; a run makes more

STEP, CHECKPOINT, EVALUATION = "in a step", "while a checkpoint is written", "during an evaluation"
ROWS, DIRECTORY = "while rows are encoded", "while the run's directory is made"
PROOF, UPLOAD = "while the artifact is written and proven", "during an upload to a bucket"
PLACES = (ROWS, DIRECTORY, STEP, EVALUATION, CHECKPOINT, UPLOAD, PROOF)
PROGRAM, GROUP, WORKER, EVERYTHING = "the program", "its process group", "a worker", "all processes"

LEGEND = """\
*Same bytes*: parameters, optimizer state, the artifact's weights, and of every step the loss, gradient norm, learning
rate, tokens and evaluation are those of a run that nothing killed, bit for bit; the same checkpoints are kept, and
nothing half written is left. In parentheses: how many of the kills found the run in the midst of it (a file half
written, an evaluation not over), of all kills; the others came a moment later.

On one device all kills of a cell are of one run, one after the other. On two devices a run gets one kill in each cell
of a kind of kill (a worker, the program, all processes), so that a difference would show in all of these cells. Where
Ray loses a worker the run goes on by itself; else it is resumed with `--resume`, or started again by the same command
where there was no run yet."""

Cell = tuple[str, str]
"""What is killed, and where."""


@dataclass(frozen=True)
class Config:
    """A config in words and by its keys, and its runs: of each, the kills that it gets one after the other."""

    words: str
    keys: dict[str, Any]
    runs: list[list[Cell]]


def configs(kills: int) -> dict[str, Config]:
    """Give the configs by name; on one device, each run gets so many kills at one place."""
    lora: dict[str, Any] = {"lora_config": {**LORA, "lora_dropout": 0.2}}
    full = {
        "weight_decay": 0.1,
        "train_batch_size_per_device": 2,
        "gradient_accumulation_steps": 4,
        "padding": "longest",
        "lr_scheduler_type": "constant",
    }
    two = {"num_devices": 2, "train_batch_size_per_device": 2, "gradient_accumulation_steps": 2, "max_failures": 9}
    one_device = [[(PROGRAM, place)] * kills for place in PLACES] + [[(GROUP, place)] * kills for place in (ROWS, STEP)]

    def on_ray(*places: str) -> list[list[Cell]]:
        killed = [(WORKER, (STEP, EVALUATION, CHECKPOINT, PROOF)), (PROGRAM, places), (EVERYTHING, places)]
        return [[(what, place) for place in where] for what, where in killed]

    def zero(stage: int) -> dict[str, Any]:
        return {"deepspeed": {"config_path": f"zero_{stage}.json"}}

    return {
        "lora": Config("LoRA, packed", lora, one_device),
        "full": Config("full, padded, accumulated", full, one_device),
        "ddp": Config(
            "LoRA, 2 × ddp",
            {**lora, **two, "parallel": "ddp"},
            [*on_ray(STEP, EVALUATION, CHECKPOINT, PROOF), [(PROGRAM, UPLOAD)]],
        ),
        "fsdp2": Config("full, 2 × fsdp2", {**full, **two, "parallel": "fsdp2"}, on_ray(STEP, CHECKPOINT)),
        "zero2": Config("full, 2 × ZeRO-2", {**full, **two, **zero(2)}, on_ray(CHECKPOINT)),
        "zero3": Config("full, 2 × ZeRO-3", {**full, **two, **zero(3)}, on_ray(STEP)),
    }


# --- a run that is killed ---------------------------------------------------------------------------------------------


class FailedError(Exception):
    """The program failed where it should have gone on."""


class Run:
    """A run under test: the program is started, killed and started again until it has come to its end."""

    def __init__(self, config: Path, directory: Path, cache: Path, bucket: FaultyStore | None = None) -> None:
        self.directory, self.cache, self.bucket = RunDirectory(directory), cache, bucket
        self.finished_step = 0
        self.evaluated: set[int] = set()
        self._config = config
        self._log = config.with_suffix(".log")
        self._events = EventTail(self.directory.events)
        self._process: subprocess.Popen[bytes] | None = None
        self._tree: ProcessTree | None = None

    @property
    def name_in_bucket(self) -> str:
        return "/".join(self.directory.path.parts[-2:])

    def go_on(self) -> None:
        """Start the program, the first time or again, unless it runs."""
        if self._process is not None:
            return
        place = str(self.directory.path)
        has_begun = self.directory.resolved_config.is_file()
        if self.bucket is not None:
            place = f"s3://{BUCKET}/{self.name_in_bucket}"
            in_bucket = "resolved_config.yaml" in self.bucket.tree(self.name_in_bucket)
            if has_begun and not in_bucket:  # as the refusal of a new start says, where `cache_dir` is the user's
                place = str(self.directory.path)
            has_begun = has_begun or in_bucket
        command = ["finetune", "--resume", place] if has_begun else ["finetune", str(self._config)]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmforge", *command],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._tree = ProcessTree(self._process)

    def wait(self, comes: Callable[[], bool] = lambda: False) -> bool:
        """Wait until that is so, or the program has come to its end; return whether it is so.

        Raises FailedError.
        """
        assert self._process is not None
        assert self._tree is not None
        deadline = time.monotonic() + LIMIT
        while self._process.poll() is None and time.monotonic() < deadline:
            self._tree.look()
            self.listen()
            if comes():
                return True
            time.sleep(LOOKS)
        if self._process.poll() != 0:
            raise FailedError(f"ended with {self._process.poll()}: {self._log.read_text(errors='replace')[-2000:]}")
        self.listen()
        return False

    def listen(self) -> None:
        """Take in what the run has written."""
        for event in self._events.new():
            if event["event"] == "step":
                self.finished_step = max(self.finished_step, event["step"])
            elif event["event"] == "evaluation":
                self.evaluated.add(event["step"])

    def kill(self, what: str, rng: random.Random) -> bool:
        """Kill with SIGKILL; return whether there was something to kill."""
        assert self._process is not None
        assert self._tree is not None
        if what == WORKER:
            workers = self._tree.workers()
            if workers:
                rng.choice(workers).kill()
            return bool(workers)
        if what == GROUP:
            os.killpg(self._process.pid, signal.SIGKILL)
        elif what == EVERYTHING:
            self._tree.kill()
        else:
            self._process.kill()
        killed = self._process.wait() == -signal.SIGKILL
        self._process = None
        return killed

    def end(self) -> None:
        """Leave nothing behind that runs."""
        if self._process is not None and self._tree is not None:
            self._tree.kill()


@dataclass(frozen=True)
class Aim:
    """Where to kill: when the run comes there, for how many seconds it stays, and whether it still is there."""

    comes: Callable[[], bool]
    seconds: float
    is_there: Callable[[], bool]


class Undisturbed:
    """A run that nothing kills, and how long it stays where."""

    def __init__(self, run: Run) -> None:
        self.directory = run.directory
        marks: dict[Path, float] = {}
        watched = [run.cache, self.directory.path, self.directory.resolved_config]
        watched += [_partial(self.directory.artifact), self.directory.artifact]

        def mark() -> bool:
            marks.update({path: time.monotonic() for path in watched if path not in marks and path.exists()})
            return False

        run.go_on()
        run.wait(mark)
        mark()
        self._last_step = run.finished_step
        events = read_events(self.directory.events)
        times = {(e["event"], e.get("step")): datetime.fromisoformat(e["time"]).timestamp() for e in events}
        cache, path, resolved, written, artifact = (marks[path] for path in watched)
        self._seconds = {
            STEP: median(e["step_seconds"] for e in events if e["event"] == "step"),
            EVALUATION: median(e["seconds"] for e in events if e["event"] == "evaluation"),
            CHECKPOINT: median(t - times["evaluation", step] for (e, step), t in times.items() if e == "checkpoint"),
            ROWS: path - cache,
            DIRECTORY: resolved - path,
            PROOF: artifact - written,
        }

    def aim(self, place: str, run: Run, left: int, rng: random.Random) -> Aim:
        """Say where to kill a run, which is to be killed so many times from here on."""
        steps: Sequence[int] = range(run.finished_step + 1, self._last_step)
        if place in (CHECKPOINT, EVALUATION):
            steps = [step for step in steps if step % EVERY == 0]
        step = steps[rng.randrange(-(-len(steps) // left))] if steps else self._last_step
        directory = run.directory
        checkpoint = directory.checkpoints / f"step-{step:06d}"
        written, proven = _partial(checkpoint), _partial(directory.artifact)

        def evaluates() -> bool:
            run.listen()
            return step not in run.evaluated

        comes, is_there = {
            ROWS: (run.cache.exists, lambda: not directory.path.exists()),
            DIRECTORY: (directory.path.exists, lambda: not directory.resolved_config.exists()),
            STEP: (lambda: run.finished_step >= step, lambda: True),
            EVALUATION: (lambda: run.finished_step >= step, evaluates),
            CHECKPOINT: (lambda: written.exists() or checkpoint.exists(), written.exists),
            PROOF: (proven.exists, proven.exists),
        }[place]
        return Aim(comes, self._seconds[place], is_there)


def aim_at_upload(store: FaultyStore, number: int) -> Aim:
    """Aim at a request that changes something in the bucket; it is never answered."""
    came = threading.Event()
    left = [number]

    def fault(request: Request) -> Fault:
        left[0] -= request.changes
        if left[0] > 0:
            return None
        came.set()
        time.sleep(1)  # in which the program is killed
        return CUT

    store.fault = fault
    return Aim(came.is_set, 0.0, lambda: True)


def _partial(path: Path) -> Path:
    return path.with_name(partial_name(path))


# --- the matrix -------------------------------------------------------------------------------------------------------


class Matrix:
    """The runs of one config: one that nothing disturbs, and those that are killed."""

    def __init__(self, place: Path, name: str, config: Config, store: FaultyStore, seed: int) -> None:
        self._place, self._name, self._config, self._store = place, name, config, store
        self._seed, self._rng = seed, random.Random(f"{seed} {name}")
        self._cache = place / f"cache-{name}"
        self._undisturbed = Undisturbed(self._run("undisturbed", self._cache))

    def kill(self, number: int, cells: Sequence[Cell]) -> dict[str, Any]:
        """Kill a run at one cell after the other, let it come to its end, and compare it with the undisturbed one."""
        began = time.monotonic()
        places = {place for _, place in cells}
        cache = self._cache.with_name(f"{self._cache.name}-{number}") if ROWS in places else self._cache
        run = self._run(f"killed-{number}", cache, in_bucket=UPLOAD in places)
        kills: list[dict[str, Any]] = []
        try:
            for count, (what, place) in enumerate(cells):
                run.go_on()
                left = len(cells) - count
                if place == UPLOAD:
                    aim = aim_at_upload(self._store, self._rng.randint(1, UPLOADS // len(cells)))
                else:
                    aim = self._undisturbed.aim(place, run, left, self._rng)
                if not run.wait(aim.comes):
                    break  # it came to its end before
                seconds = self._rng.random() * aim.seconds * MIDST
                time.sleep(seconds)
                if run.kill(what, self._rng):
                    kill = {"killed": what, "place": place, "seconds": round(seconds, 4), "was_there": aim.is_there()}
                    kills.append(kill | {"step": run.finished_step})
                self._store.fault = lambda request: None
                if place == UPLOAD and count % 2:  # it goes on from the bucket alone, as on another machine
                    shutil.rmtree(run.directory.path, ignore_errors=True)
            run.go_on()
            run.wait()
            different = [check for check in self._compare(run) if check.different]
            problems = [f"{check.name}: {', '.join(check.different[:3])}" for check in different]
        except (FailedError, LlmforgeError) as error:
            problems = [str(error)]
        finally:
            run.end()
        return {
            "config": self._name,
            "cells": list(dict.fromkeys(cells)),
            "kills": kills,
            "problems": problems,
            "seed": self._seed,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "seconds": round(time.monotonic() - began, 1),
        }

    def _run(self, tag: str, cache: Path, *, in_bucket: bool = False) -> Run:
        tag = f"{self._name}-{tag}"
        parent = self._place / "runs"
        if in_bucket:  # the program works in a copy of what is there
            parent = cache / "staging" / "s3" / BUCKET / self._name
        config = write_config(
            self._place,
            self._place / "model",
            **{
                "learning_rate": 1e-2,
                "context_length": 64,
                "valid_path": str(self._place / "valid.jsonl"),
                "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": EVERY},
                "num_checkpoints_to_keep": 2,
                "data_workers": 2,
                **self._config.keys,
                "custom_model_tag": tag,
                "cache_dir": str(cache),
                "output_dir": f"s3://{BUCKET}/{self._name}" if in_bucket else str(parent),
            },
        )
        return Run(config, parent / tag, cache, self._store if in_bucket else None)

    def _compare(self, run: Run) -> list[Check]:
        """Compare contents, and which checkpoints are kept; nothing half written may be left."""
        expected, found = self._undisturbed.directory, run.directory
        kept = [{path.name for path in each.checkpoints.iterdir()} for each in (expected, found)]
        hidden = {str(path.relative_to(found.path)) for path in found.path.rglob(".*")}
        left = sorted((kept[0] ^ kept[1]) | hidden)
        checks = [*compare_runs(expected, found), Check("files", len(kept[0]), "", left)]
        if run.bucket is not None:
            there, here = run.bucket.tree(run.name_in_bucket), tree(found.path)
            checks.append(Check("bucket", len(here), "", [n for n in here | there if here.get(n) != there.get(n)]))
        return checks


def write_data(directory: Path) -> None:
    """Write the model, the rows and DeepSpeed's files.

    What rows say behind the context length takes long to encode, and is cut off before it is trained on.
    """
    save_model(directory / "model")
    rng = random.Random(0)
    rows = conversation_rows(480)
    for row in rows:
        row["messages"][-1]["content"] += " " + " ".join(rng.choices(CORPUS, k=4_000))
    write_jsonl(directory / "train.jsonl", rows)
    write_jsonl(directory / "valid.jsonl", conversation_rows(60, seed=1))
    for stage in (2, 3):
        zero = {"zero_optimization": {"stage": stage, "overlap_comm": False}, "gradient_clipping": "auto"}
        (directory / f"zero_{stage}.json").write_text(json.dumps(zero))


def main() -> None:
    """Run everything that is asked for, and write what came out after each run."""
    options = _options()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # the S3 server's own: a line for each request
    chosen = configs(options.kills)
    path = RESULTS / "kills.json"
    results = json.loads(path.read_text()) if path.is_file() else {"runs": []}
    results["machine"] = describe(gpu=False)
    results["versions"] = {name: version(name) for name in ("torch", "ray", "deepspeed", "transformers", "peft")}
    failed = False
    with tempfile.TemporaryDirectory() as name, faulty_store() as store:
        place = Path(name)
        os.environ |= credentials(store, place / "user-cache")
        write_data(place)
        for config in options.configs:
            results["runs"] = [run for run in results["runs"] if run["config"] != config]
            matrix = Matrix(place, config, chosen[config], store, options.seed)
            for number, cells in enumerate(chosen[config].runs):
                run = matrix.kill(number, cells)
                failed = failed or bool(run["problems"])
                print(json.dumps(run), flush=True)
                results["runs"].append(run)
                path.write_text(json.dumps(results, indent=1) + "\n")
                path.with_suffix(".md").write_text(table(results, chosen))
    sys.exit(1 if failed else 0)


def table(results: dict[str, Any], chosen: dict[str, Config]) -> str:
    """Write the results for people."""
    shown = [name for name in chosen if any(run["config"] == name for run in results["runs"])]
    cells: dict[tuple[str, str, str], str] = {}
    for run in results["runs"]:
        for what, place in run["cells"]:
            there = [kill["was_there"] for kill in run["kills"] if (kill["killed"], kill["place"]) == (what, place)]
            outcome = "**differs**" if run["problems"] else "same bytes" if there else "not killed"
            cells[run["config"], what, place] = f"{outcome} ({sum(there)} of {len(there)})"
    rows = sorted({(place, what) for _, what, place in cells}, key=lambda row: (PLACES.index(row[0]), row[1]))
    lines = [
        f"| where | killed | {' | '.join(chosen[name].words for name in shown)} |",
        "|---|---|" + "---|" * len(shown),
        *(
            f"| {place} | {what} | {' | '.join(cells.get((name, what, place), '–') for name in shown)} |"
            for place, what in rows
        ),
    ]
    problems = [f"* {run['config']}: {problem}" for run in results["runs"] for problem in run["problems"]]
    kills = sum(len(run["kills"]) for run in results["runs"])
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    dates, seeds = (sorted({str(run[key]) for run in results["runs"]}) for key in ("date", "seed"))
    return (
        "# Kills\n\n"
        f"`make kills` (`benchmarks/kills.py`), seed {' and '.join(seeds)}: {kills} kills, "
        f"{sum(run['seconds'] for run in results['runs']) / 60:.0f} minutes. A model of 60,000 parameters, fp32; "
        f"{machine['processor']}, {machine['cores']} cores; {versions}; {' and '.join(dates)}.\n\n"
        + "\n".join(lines)
        + f"\n\n{LEGEND}\n"
        + "\n".join(["", *problems] if problems else [])
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(configs(1))

    def names(text: str) -> Iterable[str]:
        if wrong := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong))}; allowed: {', '.join(known)}")
        return text.split(",")

    parser.add_argument("--configs", type=names, default=known, help=f"some of {','.join(known)}")
    parser.add_argument("--kills", type=int, default=3, help="at each place, on one device")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args()


if __name__ == "__main__":
    main()
