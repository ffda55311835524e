"""A run that was stopped, however it was stopped, comes to the same files as one that was not."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build_model, conversation_rows, save_model, write_jsonl
from llmforge.checkpoint import list_checkpoints, state_of
from llmforge.config import load_config
from llmforge.errors import ConfigError, InputError, Interrupted, NonFiniteLossError, OutputError, RunError
from llmforge.jobs import finetune as jobs
from llmforge.jobs.events import read_events
from llmforge.jobs.run import load_run
from llmforge.train.backends import SingleDevice
from llmforge.train.optimization import build_optimizer
from llmforge.train.prepare import prepare_run
from llmforge.train.run import run
from llmforge.train.saver import Saver
from tiny_runs import LORA, Listener, child, command, resume_run, run_config, run_here, start, tree, write_config

DROPOUT_LORA = {**LORA, "lora_dropout": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "lora-adamw": {"lora_config": DROPOUT_LORA, "learning_rate": 1e-2},
    "lora-adafactor": {"lora_config": DROPOUT_LORA, "learning_rate": 1e-2, "optimizer": "adafactor"},
    "lora-rslora-dora": {"lora_config": {**DROPOUT_LORA, "use_dora": True, "use_rslora": True}, "learning_rate": 1e-2},
    "lora-bf16": {"lora_config": {**DROPOUT_LORA, "modules_to_save": ["lm_head"]}, "dtype": "bf16"},
    "full-adamw": {"learning_rate": 1e-2, "weight_decay": 0.1},
    "full-sgd": {"learning_rate": 1e-2, "optimizer": "sgd"},
    "full-adafactor": {"learning_rate": 1e-2, "optimizer": "adafactor", "weight_decay": 0.1},
}
# Six steps an epoch; 12 in all, with an evaluation and a checkpoint after every fifth and the last.
SCHEDULE: dict[str, Any] = {
    "num_epochs": 2,
    "num_warmup_steps": 2,
    "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 5},
    "num_checkpoints_to_keep": 2,
}


def results(run_dir: Path) -> dict[str, bytes]:
    """Give the files that must be the same: checkpoints and weights, byte for byte."""
    files = {f"checkpoints/{name}": content for name, content in tree(run_dir / "checkpoints").items()}
    artifact = tree(run_dir / "artifact")
    return files | {name: artifact[name] for name in artifact if name.endswith((".safetensors", ".json", ".yaml"))}


def same(first: dict[str, bytes], second: dict[str, bytes]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def train(config: Path, checkpoints: Path, stop_after: list[int]) -> Listener:
    """Train through `train.run`, interrupted after the given steps and resumed each time."""
    listener = Listener()
    preparation = prepare_run(load_config(config), listener)
    stops = iter([*stop_after, None])
    for number in range(len(stop_after) + 1):
        stop = next(stops)

        @contextmanager
        def interruptions(stop: int | None = stop) -> Iterator[Any]:
            yield lambda: listener.of("step", "step")[-1] == stop

        arguments: dict[str, Any] = {
            "checkpoints": checkpoints / "checkpoints",
            "artifact": checkpoints / "artifact",
            "reporter": listener,
            "interruptions": interruptions,
            "add_documents": lambda directory, result: None,
        }
        if stop is None:
            run(preparation, **arguments, resuming=number > 0)
        else:
            with pytest.raises(Interrupted, match=f"after step {stop} of 12"):
                run(preparation, **arguments, resuming=number > 0)
    return listener


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_comes_to_the_same_files(name: str, data_dir: Path, model_dir: Path) -> None:
    config = write_config(data_dir, model_dir, **CASES[name], **SCHEDULE, valid_path=str(data_dir / "valid.jsonl"))
    whole = train(config, data_dir / "whole", [])
    cut = train(config, data_dir / "cut", [1, 3, 5, 8, 11])
    assert cut.of("step", "step") == whole.of("step", "step") == list(range(1, 13))
    assert cut.of("step", "train_loss") == whole.of("step", "train_loss")
    assert cut.of("evaluation", "eval_loss") == whole.of("evaluation", "eval_loss")
    same(results(data_dir / "whole"), results(data_dir / "cut"))


def test_without_validation_data_too(data_dir: Path, model_dir: Path) -> None:
    config = write_config(data_dir, model_dir, lora_config=DROPOUT_LORA, **SCHEDULE)
    train(config, data_dir / "whole", [])
    train(config, data_dir / "cut", [2, 11])
    same(results(data_dir / "whole"), results(data_dir / "cut"))


def finished_run(data_dir: Path, model: Path, **keys: Any) -> dict[str, bytes]:
    """Run to the end in this process and give its files; the children below run the same."""
    torch.set_num_threads(1)
    return results(run_here(data_dir, model, custom_model_tag="whole", **keys)[0].run_dir)


def wait_for_steps(events: Path, count: int, is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while is_running() and time.monotonic() < deadline:
        if events.exists() and events.read_text().count('"event": "step"') >= count:
            return
        time.sleep(0.002)


LONG: dict[str, Any] = {
    "lora_config": DROPOUT_LORA,
    "learning_rate": 1e-2,
    "num_epochs": 8,
    "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 5},
    "num_checkpoints_to_keep": 2,
}


def test_ctrl_c_exits_with_130_and_resume_comes_to_the_same_files(data_dir: Path, model_dir: Path) -> None:
    keys = {**LONG, "valid_path": str(data_dir / "valid.jsonl")}
    expected = finished_run(data_dir, model_dir, **keys)
    run_dir = data_dir / "runs" / "run"
    process = start("finetune", write_config(data_dir, model_dir, **keys))
    wait_for_steps(run_dir / "events.jsonl", 7, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"llmforge finetune --resume {run_dir}" in out + err
    failed = read_events(run_dir / "events.jsonl")[-1]
    assert failed["event"] == "failed"
    assert "interrupted after step" in failed["error"]
    assert not (run_dir / "artifact").exists()

    resumed = command("finetune", "--resume", run_dir, "--json")
    assert resumed.returncode == 0, resumed.stderr
    same(expected, results(run_dir))
    finished = [event for event in read_events(run_dir / "events.jsonl") if event["event"] == "finished"]
    assert json.loads(resumed.stdout)["metrics"] == finished[0]["metrics"]


FULL: dict[str, Any] = {
    "lora_config": None,
    "optimizer": "adafactor",
    "lr_scheduler_type": "constant",
    "train_batch_size_per_device": 3,
    "gradient_accumulation_steps": 3,
    "padding": "longest",
}


@pytest.mark.parametrize("more", [{}, FULL], ids=["lora", "full"])
def test_kills_at_any_moment_lose_nothing(more: dict[str, Any], data_dir: Path, model_dir: Path) -> None:
    """Kill a run again and again, each time a little later, mostly while it writes: a checkpoint after each step."""
    keys = {**LONG, **more, "num_epochs": 6, "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1}}
    expected = finished_run(data_dir, model_dir, **keys)
    run_dir = data_dir / "runs" / "run"
    rng = random.Random(0)
    target: Any = run_config
    path = write_config(data_dir, model_dir, **keys)
    for steps in (1, 4, 9, 14, 20, 26, 33) if not more else (2, 7, 19, 30):
        process = child(target, path)
        wait_for_steps(run_dir / "events.jsonl", steps, process.is_alive)
        time.sleep(rng.random() * 0.03)
        process.kill()
        process.join(100)
        assert process.exitcode == -signal.SIGKILL
        target, path = resume_run, run_dir
    process = child(resume_run, run_dir)
    process.join(100)
    assert process.exitcode == 0
    same(expected, results(run_dir))
    assert list(run_dir.rglob(".*")) == []  # nothing half-written is left


def test_a_kill_while_a_checkpoint_is_written_or_deleted_leaves_the_one_before(data_dir: Path, model_dir: Path) -> None:
    config = write_config(data_dir, model_dir, lora_config=DROPOUT_LORA, **SCHEDULE)
    train(config, data_dir / "whole", [])
    with pytest.raises(AssertionError):  # stopped, and not resumed
        train_until(config, data_dir / "cut", 8)
    checkpoints = data_dir / "cut" / "checkpoints"
    shutil.copytree(checkpoints / "step-000008", checkpoints / ".step-000009.partial")
    (checkpoints / ".step-000009.partial" / "state.json").unlink()
    shutil.copytree(checkpoints / "step-000008", checkpoints / ".step-000005.deleted")
    assert [checkpoint.step for checkpoint in list_checkpoints(checkpoints)] == [5, 8]
    listener = Listener()
    run(
        prepare_run(load_config(config), listener),
        checkpoints=checkpoints,
        artifact=data_dir / "cut" / "artifact",
        reporter=listener,
        interruptions=never,
        add_documents=lambda directory, result: None,
        resuming=True,
    )
    assert listener.of("step", "step") == [9, 10, 11, 12]
    same(results(data_dir / "whole"), results(data_dir / "cut"))
    assert list(checkpoints.glob(".*")) == []


def test_a_kill_before_superseded_checkpoints_are_deleted_leaves_none_behind(data_dir: Path, model_dir: Path) -> None:
    """Kill a run behind its last checkpoint: no other one is written after it, which would tidy up."""
    one = write_config(data_dir, model_dir, lora_config=DROPOUT_LORA, **EVERY_STEP)
    train(one, data_dir / "whole", [])
    all_of_them = write_config(
        data_dir, model_dir, lora_config=DROPOUT_LORA, **EVERY_STEP, num_checkpoints_to_keep=9, custom_model_tag="all"
    )
    train(all_of_them, data_dir / "cut", [])
    assert len(list_checkpoints(data_dir / "cut" / "checkpoints")) == 6
    run(
        prepare_run(load_config(one), Listener()),
        checkpoints=data_dir / "cut" / "checkpoints",
        artifact=data_dir / "cut" / "artifact",
        reporter=Listener(),
        interruptions=never,
        add_documents=lambda directory, result: None,
        resuming=True,
    )
    same(results(data_dir / "whole"), results(data_dir / "cut"))


@contextmanager
def never() -> Iterator[Any]:
    yield lambda: False


def train_until(config: Path, directory: Path, step: int) -> None:
    """Stop after a step and do not resume."""
    train_listener = Listener()

    @contextmanager
    def interruptions() -> Iterator[Any]:
        yield lambda: train_listener.of("step", "step")[-1] == step

    try:
        run(
            prepare_run(load_config(config), train_listener),
            checkpoints=directory / "checkpoints",
            artifact=directory / "artifact",
            reporter=train_listener,
            interruptions=interruptions,
            add_documents=lambda path, result: None,
        )
    except Interrupted as error:
        raise AssertionError from error


def interrupted_run(data_dir: Path, model: Path, number: int = signal.SIGINT, **keys: Any) -> Path:
    """Start a run in this process and press ctrl-C, or send another signal, during its third step."""

    class Impatient(Listener):
        def event(self, event: str, **fields: Any) -> None:
            super().event(event, **fields)
            if event == "step" and fields["step"] == 3:
                signal.raise_signal(number)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(Interrupted, match="after step 3"):
        jobs.finetune(load_config(write_config(data_dir, model, **keys)), Impatient())
    return data_dir / "runs" / "run"


def test_changed_data_model_or_adapter_are_refused_with_words(data_dir: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    adapter = run_here(data_dir, model, lora_config=LORA, custom_model_tag="adapter", seed=5)[0].artifact_dir
    run_dir = interrupted_run(
        data_dir,
        model,
        lora_config=LORA,
        valid_path=str(data_dir / "valid.jsonl"),
        initial_adapter_model_ckpt_path=str(adapter),
    )

    def refused(*words: str) -> None:
        with pytest.raises(ConfigError, match="cannot be continued") as caught:
            jobs.resume(run_dir, Listener())
        assert all(word in str(caught.value) for word in (*words, "changed since it started", "new run")), caught.value

    for name in ("train", "valid"):
        before = (data_dir / f"{name}.jsonl").read_text()
        write_jsonl(data_dir / f"{name}.jsonl", conversation_rows(48, seed=7))
        refused(f"the rows of {name}_path")
        (data_dir / f"{name}.jsonl").write_text(before)
    for path, words in (
        (model / "model.safetensors", "the base model"),
        (adapter / "adapter_model.safetensors", "the adapter to continue"),
    ):
        content = path.read_bytes()
        path.write_bytes(content[:-4] + b"\0\0\0\1")
        refused(words)
        path.write_bytes(content)
    assert jobs.resume(run_dir, Listener()).run_dir == run_dir


def flip(file: Path) -> None:
    """Change one bit in the middle of a file, as a failing disk does."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


EVERY_STEP: dict[str, Any] = {"checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 1}}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: truncate(path / "optimizer.safetensors"), "optimizer.safetensors has"),
        (lambda path: flip(path / "parameters.safetensors"), "bytes of parameters.safetensors have changed"),
        (lambda path: (path / "state.json").write_text("{"), "state.json cannot be read"),
    ],
    ids=["truncated", "flipped", "no json"],  # other kinds of damage: test_checkpoint.py
)
def test_the_checkpoint_before_a_damaged_one_comes_to_the_same_files(
    damage: Callable[[Path], object], reason: str, data_dir: Path, model_dir: Path
) -> None:
    keys = {"lora_config": DROPOUT_LORA, "learning_rate": 1e-2, **EVERY_STEP}
    expected = results(run_here(data_dir, model_dir, **keys, custom_model_tag="whole")[0].run_dir)
    run_dir = interrupted_run(data_dir, model_dir, **keys)
    damage(run_dir / "checkpoints" / "step-000003")
    listener = Listener()
    jobs.resume(run_dir, listener)
    assert listener.of("started", "resumed_from") == [2]
    assert listener.of("step", "step") == [3, 4, 5, 6]
    assert [note for note in listener.notes if f"step-000003 is damaged ({reason}" in note and "step-000002" in note]
    assert any("is damaged" in event["text"] for event in read_events(run_dir / "events.jsonl") if "text" in event)
    shutil.rmtree(run_dir / "checkpoints" / ".step-000003.damaged")  # which the note says may be deleted
    same(expected, results(run_dir))


def test_with_no_checkpoint_left_a_run_starts_again(data_dir: Path, model_dir: Path) -> None:
    keys = {"lora_config": DROPOUT_LORA, "learning_rate": 1e-2, **EVERY_STEP}
    expected = results(run_here(data_dir, model_dir, **keys, custom_model_tag="whole")[0].run_dir)
    run_dir = interrupted_run(data_dir, model_dir, **keys)
    for path in (run_dir / "checkpoints").iterdir():
        flip(path / "parameters.safetensors")
    listener = Listener()
    jobs.resume(run_dir, listener)
    assert listener.of("started", "resumed_from") == [None]
    assert listener.of("step", "step") == list(range(1, 7))
    assert sum("starts again at its beginning" in note for note in listener.notes) == 2
    for path in (run_dir / "checkpoints").glob(".*.damaged"):
        shutil.rmtree(path)
    same(expected, results(run_dir))


def test_a_checkpoint_of_another_model_is_refused(data_dir: Path, model_dir: Path) -> None:
    run_dir = interrupted_run(data_dir, model_dir, lora_config=LORA)
    resolved = run_dir / "resolved_config.yaml"
    resolved.write_text(resolved.read_text().replace("  r: 4", "  r: 2"))
    with pytest.raises(RunError, match="step-000003 was written for another model"):
        jobs.resume(run_dir, Listener())
    assert (run_dir / "checkpoints" / "step-000003").is_dir()


def last_event(run_dir: Path) -> dict[str, Any]:
    """Give the last event of a run; an empty one where there is none yet."""
    events = read_events(run_dir / "events.jsonl") if (run_dir / "events.jsonl").is_file() else []
    return events[-1] if events else {}


def is_evaluating(run_dir: Path) -> bool:
    last = last_event(run_dir)
    return last.get("event") == "step" and last["step"] % 3 == 0


# When a kind of work has begun, as far as it shows from outside.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "loading": lambda run_dir: (run_dir / "run.lock").exists(),
    "evaluation": is_evaluating,
    "checkpoint": lambda run_dir: any((run_dir / "checkpoints").glob(".step-*.partial")),
    "artifact": lambda run_dir: (run_dir / ".artifact.partial").exists(),
}


def test_a_kill_during_each_kind_of_work_loses_nothing(data_dir: Path, model_dir: Path) -> None:
    keys = {
        **LONG,
        "num_epochs": 4,
        "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 3},
        "valid_path": str(data_dir / "valid.jsonl"),
    }
    expected = finished_run(data_dir, model_dir, **keys)
    run_dir = data_dir / "runs" / "run"
    target: Any = run_config
    path = write_config(data_dir, model_dir, **keys)
    rng = random.Random(1)
    for moment, has_come in MOMENTS.items():
        process = child(target, path)
        deadline = time.monotonic() + 60
        while process.is_alive() and not has_come(run_dir):
            assert time.monotonic() < deadline, moment
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.003)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, moment
        if (run_dir / "resolved_config.yaml").exists():
            target, path = resume_run, run_dir
        elif run_dir.exists():  # killed before there was anything to resume: as the error says, it starts again
            with pytest.raises(InputError, match=r"start the run again|not the directory of a run"):
                jobs.resume(run_dir, Listener())
    process = child(target, path)
    process.join(60)
    assert process.exitcode == 0
    same(expected, results(run_dir))
    assert list(run_dir.rglob(".*")) == []
    assert not (run_dir / "run.lock").exists()


def test_a_run_belongs_to_one_process_at_a_time(data_dir: Path, model_dir: Path) -> None:
    run_dir = data_dir / "runs" / "run"
    config = write_config(data_dir, model_dir, **LONG)
    process = child(run_config, config)
    wait_for_steps(run_dir / "events.jsonl", 11, process.is_alive)  # the second checkpoint waits for the first
    os.kill(process.pid, signal.SIGSTOP)  # so that it does not end meanwhile
    try:
        with pytest.raises(OutputError, match=rf"{run_dir} is being trained by process {process.pid} on .*at a time"):
            jobs.resume(run_dir, Listener())
        with pytest.raises(OutputError, match="already holds a run"):
            jobs.finetune(load_config(config), Listener())
        with pytest.raises(InputError, match="has not finished"):  # who only reads is not held up
            load_run(run_dir)
    finally:
        process.kill()
        process.join(60)
    assert (run_dir / "run.lock").exists()
    listener = Listener()
    jobs.resume(run_dir, listener)
    assert listener.of("started", "resumed_from")[0] >= 5
    assert not (run_dir / "run.lock").exists()


def test_sigterm_stops_a_run_as_ctrl_c_does(data_dir: Path, model_dir: Path) -> None:
    expected = results(run_here(data_dir, model_dir, lora_config=DROPOUT_LORA, custom_model_tag="whole")[0].run_dir)
    run_dir = interrupted_run(data_dir, model_dir, signal.SIGTERM, lora_config=DROPOUT_LORA)
    assert "interrupted after step 3" in last_event(run_dir)["error"]
    jobs.resume(run_dir, Listener())
    same(expected, results(run_dir))


def test_nothing_depends_on_the_clock(data_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with a clock that goes back an hour whenever it is read, and resume among files of the wrong times."""
    keys = {"lora_config": DROPOUT_LORA, "valid_path": str(data_dir / "valid.jsonl"), **EVERY_STEP}
    expected = results(run_here(data_dir, model_dir, **keys, custom_model_tag="whole")[0].run_dir)
    hours = itertools.count()

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2030, 1, 1, tzinfo=UTC) - timedelta(hours=next(hours))

    monkeypatch.setattr("llmforge.jobs.events.datetime", Clock)
    monkeypatch.setattr(time, "time", lambda: 4e9 - 3600.0 * next(hours))
    run_dir = interrupted_run(data_dir, model_dir, **keys)
    rng = random.Random(2)
    for path in data_dir.rglob("*"):
        os.utime(path, (rng.random() * 4e9,) * 2)
    jobs.resume(run_dir, Listener())
    same(expected, results(run_dir))
    times = [event["time"] for event in read_events(run_dir / "events.jsonl")]
    assert times == sorted(times, reverse=True)
    assert load_run(run_dir).metrics


def test_a_limit_on_the_size_of_files_leaves_the_checkpoint_before(data_dir: Path, model_dir: Path) -> None:
    """Like a full disk, which other tests have, but found by the system and not by us."""
    keys = {"lora_config": DROPOUT_LORA, **EVERY_STEP}
    expected = results(run_here(data_dir, model_dir, **keys, custom_model_tag="whole")[0].run_dir)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limiting(Listener):
        def event(self, event: str, **fields: Any) -> None:
            super().event(event, **fields)
            if event == "checkpoint" and fields["step"] == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        with pytest.raises(OutputError, match=r"step-000003 is larger than this process may write.*ulimit -f"):
            jobs.finetune(load_config(write_config(data_dir, model_dir, **keys)), Limiting())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    run_dir = data_dir / "runs" / "run"
    assert last_event(run_dir)["event"] == "failed"
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir / "checkpoints")] == [1, 2]
    assert list(run_dir.rglob(".*")) == []
    jobs.resume(run_dir, Listener())
    same(expected, results(run_dir))


def test_resuming_a_finished_run_gives_it_back(data_dir: Path, model_dir: Path) -> None:
    done, _ = run_here(data_dir, model_dir, valid_path=str(data_dir / "valid.jsonl"))
    before = results(done.run_dir)
    listener = Listener()
    again = jobs.resume(done.run_dir, listener)
    assert (again.run_dir, again.tag, again.metrics) == (done.run_dir, done.tag, done.metrics)
    assert listener.events == []
    assert "has finished already" in listener.notes[0]
    # Without its artifact, as after a kill while it was written, the artifact is written again.
    shutil.rmtree(done.artifact_dir)
    jobs.resume(done.run_dir, listener)
    assert listener.of("step", "step") == []
    same(before, results(done.run_dir))


def test_a_moved_run_directory_can_be_resumed(data_dir: Path, model_dir: Path) -> None:
    run_dir = interrupted_run(data_dir, model_dir, lora_config=LORA)
    moved = run_dir.rename(data_dir / "elsewhere")
    resumed = jobs.resume(moved, Listener())
    assert resumed.artifact_dir == moved / "artifact"
    assert (moved / "artifact" / "adapter_model.safetensors").is_file()
    assert not run_dir.exists()


@pytest.mark.parametrize("left", [(), ("run.lock",), ("run.lock", "rows.jsonl", ".manifest.json.1a2b3c4d.partial")])
def test_a_run_stopped_before_its_first_step_says_so(left: tuple[str, ...], data_dir: Path, model_dir: Path) -> None:
    directory = data_dir / "runs" / "early"
    directory.mkdir(parents=True)
    shutil.copy(write_config(data_dir, model_dir), directory / "config.yaml")
    for name in left:
        (directory / name).touch()
    with pytest.raises(ConfigError, match="start the run again"):
        jobs.resume(directory, Listener())


def test_parameters_that_are_no_numbers_are_never_checkpointed(tmp_path: Path) -> None:
    model = build_model(40)
    optimizer = build_optimizer("adamw", model.named_parameters(), weight_decay=0.0)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    saver = Saver(tmp_path, backend=SingleDevice(torch.device("cpu")), last_step=9, keep=1, reporter=Listener())
    with pytest.raises(NonFiniteLossError, match=r"step 7 made lm_head\.weight NaN or infinite"), saver:
        saver.save(state_of(model, optimizer), step=7, metrics={})
    assert list(tmp_path.iterdir()) == []
