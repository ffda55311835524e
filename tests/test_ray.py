"""Runs on workers of Ray Train: the same files as without it, and again after workers or the driver were killed."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from conftest import conversation_rows, write_jsonl
from llmforge.errors import RunError
from llmforge.jobs import ray_cluster
from llmforge.jobs.cluster import Placement
from llmforge.jobs.events import EventTail, read_events
from llmforge.jobs.stragglers import STEPS, Stragglers
from ranks import reported, train_on_ranks
from tiny_runs import LORA, Listener, command, start, write_config

KEYS: dict[str, Any] = {
    "num_devices": 2,
    "train_batch_size_per_device": 2,
    "gradient_accumulation_steps": 2,
    "lora_config": {**LORA, "lora_dropout": 0.2},
    "learning_rate": 1e-2,
    "num_epochs": 12,
    "checkpoint_and_evaluation_frequency": {"unit": "steps", "frequency": 5},
    "num_checkpoints_to_keep": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ray")
    write_jsonl(directory / "train.jsonl", conversation_rows(48))
    write_jsonl(directory / "valid.jsonl", conversation_rows(12, seed=1))
    return directory


@pytest.fixture(scope="module")
def expected(place: Path, model_dir: Path) -> Path:
    """Train the same on two ranks without Ray, and without being disturbed."""
    config = write_config(place, model_dir, **KEYS, valid_path=str(place / "valid.jsonl"), custom_model_tag="plain")
    train_on_ranks(2, place / "meeting", [(config, place / "plain", None)])
    return place / "plain"


def wait_for(condition: Callable[[], Any], process: Any, seconds: float = 200) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"never came: {process.communicate(timeout=10)}")


def steps_in(events: Path) -> int:
    return events.read_text().count('"event": "step"') if events.exists() else 0


def workers_of(driver: int) -> list[psutil.Process]:
    """Find the workers that train, among the processes that a driver started."""
    return [p for p in psutil.Process(driver).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def assert_same_result(run_dir: Path, expected: Path) -> None:
    first, second = (load_file(d / "artifact" / "adapter_model.safetensors") for d in (run_dir, expected))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    steps = {event["step"]: event for event in read_events(run_dir / "events.jsonl") if event["event"] == "step"}
    assert [steps[step]["train_loss"] for step in sorted(steps)] == reported(expected, "step", "train_loss")


def test_a_killed_worker_and_a_killed_driver_cost_steps_and_nothing_else(
    place: Path, model_dir: Path, expected: Path
) -> None:
    config = write_config(place, model_dir, **KEYS, valid_path=str(place / "valid.jsonl"), custom_model_tag="run")
    run_dir = place / "runs" / "run"
    events = run_dir / "events.jsonl"
    process = start("finetune", config)
    wait_for(lambda: steps_in(events) >= 13, process)
    wait_for(lambda: workers_of(process.pid), process)[-1].send_signal(signal.SIGKILL)
    wait_for(lambda: '"restarted"' in events.read_text(), process)
    began = steps_in(events)
    wait_for(lambda: steps_in(events) >= began + 8, process)
    left = workers_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert psutil.wait_procs(left, timeout=60)[1] == []  # they notice that their driver is gone

    resumed = start("finetune", "--resume", run_dir, "--json")
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert json.loads(out)["run_dir"] == str(run_dir)
    assert_same_result(run_dir, expected)
    assert [event["attempt"] for event in read_events(events) if event["event"] == "restarted"] == [1]


def test_a_worker_that_is_slow_told_to_go_or_hangs(place: Path, model_dir: Path, expected: Path) -> None:
    keys = {**KEYS, "worker_timeout": 15, "valid_path": str(place / "valid.jsonl"), "custom_model_tag": "troubled"}
    run_dir = place / "runs" / "troubled"
    events = run_dir / "events.jsonl"
    process = start("finetune", write_config(place, model_dir, **keys))

    def last_worker() -> psutil.Process:
        return wait_for(lambda: workers_of(process.pid), process)[-1]

    wait_for(lambda: steps_in(events) >= 2, process)
    slow = last_worker()

    def named_while_slow() -> bool:
        slow.suspend()
        time.sleep(0.06)
        slow.resume()
        return "times as long as the others" in events.read_text()

    wait_for(named_while_slow, process)
    slow.terminate()
    wait_for(lambda: "was told to end" in events.read_text(), process)
    began = steps_in(events)
    wait_for(lambda: steps_in(events) >= began + 3, process)
    last_worker().suspend()

    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same_result(run_dir, expected)
    found = read_events(events)
    told, hung = (event for event in found if event["event"] == "restarted")
    (note,) = (event["text"] for event in found if event["event"] == "note")
    steps = [event["step"] for event in found if event["event"] == "step"]
    assert len(steps) - len(set(steps)) < 5  # the checkpoint that the notice caused cost none
    assert (told["attempt"], hung["attempt"]) == (0, 1)
    assert f"SIGTERM to process {slow.pid}" in told["reason"]
    assert "does not answer" in hung["reason"]
    assert re.match(r"worker \d takes \d", note)


def test_ctrl_c_stops_all_workers_after_a_step(place: Path, model_dir: Path, expected: Path) -> None:
    config = write_config(place, model_dir, **KEYS, valid_path=str(place / "valid.jsonl"), custom_model_tag="stopped")
    run_dir = place / "runs" / "stopped"
    process = start("finetune", config)
    wait_for(lambda: steps_in(run_dir / "events.jsonl") >= 7, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"llmforge finetune --resume {run_dir}" in out + err
    assert "interrupted after step" in read_events(run_dir / "events.jsonl")[-1]["error"]


def test_what_a_worker_refuses_is_said_once_and_not_tried_again(place: Path, model_dir: Path) -> None:
    config = write_config(
        place,
        model_dir,
        **KEYS
        | {"learning_rate": 1.0, "max_grad_norm": 1e30, "num_epochs": 40, "optimizer": "sgd", "lora_config": None},
        custom_model_tag="broken",
    )
    process = start("finetune", config)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Lower learning_rate" in err
    assert "Traceback" not in err
    assert not [event for event in read_events(place / "runs/broken/events.jsonl") if event["event"] == "restarted"]


NODES = [{"CPU": 8.0, "memory": 16.0 * 2**30, "node:10.0.0.1": 1.0}, {"CPU": 2.0, "memory": 16.0 * 2**30}]


class BusyRay:
    """Stands for Ray on a machine where it does not start in time."""

    def __init__(self, failures: int) -> None:
        self.calls: list[str] = []
        self._failures = failures

    def init(self, address: str, **options: Any) -> str:
        self.calls.append("init")
        if self.calls.count("init") <= self._failures:
            raise Exception("The current node timed out during startup.")
        return "context"

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def test_a_ray_that_does_not_start_is_tried_once_more_and_then_told_of() -> None:
    listener, busy = Listener(), BusyRay(1)
    assert ray_cluster._start_here(busy, 2, listener.note, {}) == "context"
    assert busy.calls == ["init", "shutdown", "init"]
    assert "timed out during startup" in listener.notes[0]
    with pytest.raises(RunError, match=r"could not be started .*timed out.*try again later"):
        ray_cluster._start_here(BusyRay(2), 2, listener.note, {})


@pytest.mark.parametrize(
    ("each", "extra", "key", "words"),
    [
        ({"CPU": 4.0}, {}, "num_devices", ("3 workers of 4 CPU each", "8 CPU, 16.0 GiB memory; 2 CPU")),
        ({"CPU": 2.0}, {"CPU": 6.0}, "num_devices", ("3 workers of 2 CPU each and 6 CPU for the first",)),
        ({"CPU": 1.0, "A10G": 0.001}, {}, "worker_resources", ("no node", "0.001 A10G", "worker_resources={}")),
        ({"CPU": 2.0}, {"memory": 64 * 2**30}, "trainer_resources", ("64.0 GiB memory", "trainer_resources={}")),
    ],
)
def test_what_never_fits(each: dict[str, float], extra: dict[str, float], key: str, words: tuple[str, ...]) -> None:
    ((found, text),) = Placement(3, each, extra).obstacles(NODES)
    assert found == key
    for word in words:
        assert word in text


def test_what_fits() -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 2.0, "memory": 16.0 * 2**30}]
    assert Placement(4, {"CPU": 2.0, "GPU": 1.0}, {"memory": 8.0 * 2**30}).obstacles(nodes) == []


def test_what_this_machine_cannot_hold_is_refused_before_rows_are_read(tmp_path: Path, model_dir: Path) -> None:
    keys = {"num_devices": 2, "worker_resources": {"accelerator_type:A10G": 0.001}}
    config = write_config(tmp_path, model_dir, **keys, trainer_resources={"memory": 2**50})
    done = command("finetune", config)
    assert done.returncode == 2
    lines = config.read_text().splitlines()
    for key, words in {
        "worker_resources": "0.001 accelerator_type:A10G",
        "trainer_resources": "1048576.0 GiB memory",
    }.items():
        (error,) = (line for line in done.stderr.splitlines() if f"{key}: no node" in line)
        assert f"{config}:{lines.index(f'{key}:') + 1}: " in error
        assert words in error
        assert f"--set '{key}={{}}'" in error
    assert "--wait" in done.stderr


def test_stragglers_are_named_once() -> None:
    notes: list[str] = []
    watch = Stragglers(notes.append)
    for step in range(3 * STEPS):
        slow = 0.1 if step == 4 else 0.31
        busy = [0.1, slow, 0.105]
        watch.event("step", workers=[{"worker": rank, "busy_seconds": value} for rank, value in enumerate(busy)])
    assert len(notes) == 1
    assert notes[0].startswith("worker 1 takes 3.0 times")


def test_a_tail_gives_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "old"}\n')
    tail = EventTail(path)
    with open(path, "a") as file:
        file.write('{"event": "step", "train_loss": null, "non_finite": {"train_loss": "nan"}}\n{"event": "no')
    (event,) = tail.new()
    assert event["event"] == "step"
    assert event["train_loss"] != event["train_loss"]
    with open(path, "a") as file:
        file.write('te"}\n')
    assert [event["event"] for event in tail.new()] == ["note"]
    assert tail.new() == []
