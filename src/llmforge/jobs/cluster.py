"""Trains on workers of Ray Train: starts Ray here or joins a cluster, watches, and starts again what was lost.

The workers are plain torch programs (`jobs/worker.py`). They write the run's events into its directory, which every
worker sees; what they write is read here for the display. No progress goes through `ray.train.report`: each report
waits for Ray's next poll. A worker that is lost costs the time since the last checkpoint: all of them start again from
it, `max_failures` times. One that is told to go (`jobs/notices.py`) has all of them write a checkpoint first.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmforge import errors
from llmforge.config import LoadedConfig
from llmforge.config.schema import FineTuningConfig
from llmforge.errors import ConfigError, Interrupted, LlmforgeError, RunError
from llmforge.jobs.events import EventLog, EventTail
from llmforge.jobs.interruptions import remember_interrupts
from llmforge.jobs.ray_cluster import connected, require_ray
from llmforge.jobs.run_directory import RunDirectory
from llmforge.jobs.worker import FAILURE, STOP, Orders, work
from llmforge.train.reporter import Reporter

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_WITHOUT_A_SIGN = 300  # after which a process that answers nothing at all, not even Ray, counts as lost
# Ray Train's controller looks at its workers every 2 seconds by default, and waits for as long at every turn.
_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # a worker that hangs does not leave it at all
}


@dataclass(frozen=True)
class Placement:
    """What Ray is asked for: workers, what each of them needs, and what is held for the first one besides."""

    workers: int
    each: Mapping[str, float]
    extra: Mapping[str, float]

    @classmethod
    def of(cls, config: FineTuningConfig, workers: int, *, has_gpu: bool, cores: int) -> "Placement":
        """Give one GPU to each worker, or a share of a machine's cores where there is none."""
        on_gpus = has_gpu or "GPU" in config.worker_resources
        own: dict[str, float] = {"GPU": 1.0, "CPU": 1.0} if on_gpus else {"CPU": float(max(1, cores // workers))}
        return cls(workers, {**own, **config.worker_resources}, config.trainer_resources)

    def obstacles(self, nodes: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
        """Find out why nodes with these resources can never hold the workers: keys of the config, and what is wrong."""
        there = "; ".join(_in_words(node) for node in nodes) or "nothing"
        found = [
            (
                key,
                f"no node of the Ray cluster has {_in_words(request)}, which {who} is to have; they have {there}. "
                f"Change {key}; --set '{key}={{}}' asks for nothing besides what llmforge asks for itself",
            )
            for key, request, who in (
                ("worker_resources", self.each, "each worker"),
                ("trainer_resources", self.extra, "the first worker besides"),
            )
            if not any(_holds(node, request) for node in nodes)
        ]
        if found:
            return found
        left = [dict(node) for node in nodes]
        for request in [self.extra, *[self.each] * self.workers]:
            place = next((node for node in left if _holds(node, request)), None)
            if place is None:
                extra = f" and {_in_words(self.extra)} for the first" if self.extra else ""
                text = (
                    f"{self.workers} workers of {_in_words(self.each)} each{extra} do not fit into the Ray cluster, "
                    f"whose nodes have {there}. Lower num_devices, ask for less in worker_resources, or add nodes"
                )
                return [("num_devices", text)]
            for key, value in request.items():
                place[key] = place.get(key, 0.0) - value
        return []


@contextmanager
def placed(
    loaded: LoadedConfig, workers: int | None, *, wait: bool, note: Callable[[str], None]
) -> Iterator[Placement | None]:
    """Reach the cluster for a run's workers and stay connected; None where the run needs none.

    Args:
        workers: how many, for a run that is resumed on another number.
        wait: for resources that a cluster which grows by itself does not have yet.
        note: hears where the run goes.

    Raises:
        InputError: Ray is not installed, no cluster answers, or it can never hold the workers.
    """
    config, count = loaded.config, workers or loaded.config.num_devices
    alone = count == 1 and config.parallel in ("auto", "ddp") and config.deepspeed is None
    if alone and not (config.worker_resources or config.trainer_resources):
        yield None
        return
    ray = _import_ray()
    with connected(note=note, cpus_of_own=max(count, _own_cores())):
        there = ray.cluster_resources()
        placement = Placement.of(config, count, has_gpu=bool(there.get("GPU")), cores=int(there.get("CPU", 1)))
        if wait:
            note(f"asking the cluster for {count} workers of {_in_words(placement.each)} each")
            if "GPU" not in placement.each:
                note(
                    "it has no GPU now, so workers are CPU processes; for GPUs to come, set worker_resources: {GPU: 1}"
                )
        elif obstacles := placement.obstacles(_nodes(ray)):
            raise _refusal(loaded, obstacles)
        yield placement


def _refusal(loaded: LoadedConfig, obstacles: Sequence[tuple[str, str]]) -> ConfigError:
    """Make one error of all that keeps the workers from being placed, each with its line."""
    first, *others = (loaded.error(key, text) for key, text in obstacles)
    growing = "Where the cluster grows by itself, `llmforge anyscale finetune --wait` waits for it"
    text = "\n".join([first.message, *map(str, others), growing])
    return ConfigError(text, file=first.file, line=first.line)


def train_on_ray(
    directory: RunDirectory,
    placement: Placement,
    audience: Reporter,
    *,
    place: str,
    overrides: Sequence[str] = (),
    max_failures: int,
    timeout: int,
    allow_unproven: bool,
    stop_after: int | None = None,
) -> None:
    """Train a prepared run on workers until its artifact is there.

    Args:
        directory: of the run, on storage that every worker sees under the same path.
        stop_after: the step after which the workers stop as for ctrl-C.

    Raises:
        InputError, RunError: as the workers raised it, or they were lost too often.
    """
    ray = _import_ray()
    orders = Orders(str(directory.path), place, tuple(overrides), allow_unproven, stop_after)
    lost = 0
    with _held(ray, placement.extra):
        while ending := _attempt(ray, placement, orders, directory, audience, timeout=timeout):
            lost += not ending.told
            if lost > max_failures:
                raise RunError(
                    f"workers were lost {lost} times; max_failures is {max_failures}. The last time: {ending.reason}. "
                    f"The run is kept: llmforge finetune --resume {place}"
                ) from ending.error
            with EventLog(directory.events) as events:
                events.event("restarted", attempt=lost, of=max_failures, reason=ending.reason)
            audience.note(
                f"{ending.reason}; all start again from the checkpoint that was written then"
                if ending.told
                else f"a worker was lost ({ending.reason}); all start again from the last checkpoint, {lost} of "
                f"{max_failures} times"
            )
            for key, text in placement.obstacles(_nodes(ray)):
                audience.note(f"waiting for the cluster to have room. {key}: {text}")


@dataclass(frozen=True)
class _Ending:
    """How the workers ended before the run did: one was lost, or one was told to go and a checkpoint was written."""

    error: BaseException
    reason: str
    told: bool


def _attempt(
    ray: Any, placement: Placement, orders: Orders, directory: RunDirectory, audience: Reporter, *, timeout: int
) -> _Ending | None:
    """Run the workers once, showing what they write; None if they came to the run's end.

    Raises:
        LlmforgeError: what a worker raised on purpose. To start it again would end in the same way.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from llmforge.jobs.notices import NoticingTorchConfig

    for name in (FAILURE, STOP):
        (directory.path / name).unlink(missing_ok=True)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(min(timeout, _SECONDS_WITHOUT_A_SIGN))
    storage = directory.path / ".ray"
    gpu = "GPU" in placement.each
    trainer = TorchTrainer(
        work,
        train_loop_config=orders.as_dict(),
        scaling_config=ScalingConfig(
            num_workers=placement.workers, use_gpu=gpu, resources_per_worker=dict(placement.each)
        ),
        # Counts travel between the hosts' memories, gradients between the devices.
        torch_config=NoticingTorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=timeout),
        run_config=RunConfig(name="workers", storage_path=str(storage), failure_config=FailureConfig(max_failures=0)),
    )
    ended: list[BaseException | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            ended.append(None)
        except BaseException as error:  # told to the thread that waits
            ended.append(error)

    events = EventTail(directory.events)
    thread = threading.Thread(target=fit, daemon=True)
    training = False
    with remember_interrupts(audience.note) as interrupted:
        thread.start()
        while thread.is_alive():
            thread.join(_SECONDS_BETWEEN_LOOKS)
            training |= "started" in _tell(events, audience)
            if interrupted():
                (directory.path / STOP).touch()
                if not training:  # they may be waiting for room, and there is nothing to be lost
                    raise Interrupted(
                        f"interrupted before the workers began; llmforge finetune --resume {directory.path}"
                    )
    _tell(events, audience)
    shutil.rmtree(storage, ignore_errors=True)
    (error,) = ended
    if error is None:
        return None
    meant = _meant(directory)
    stop = directory.path / STOP
    told = stop.read_text(encoding="utf-8") if isinstance(meant, Interrupted) and stop.is_file() else ""
    if meant is not None and (interrupted() or not told):
        raise meant
    return _Ending(error, told or _reason(error), bool(told))


def _tell(events: EventTail, audience: Reporter) -> list[str]:
    """Pass on what the workers have written; give the names of these events."""
    told = []
    for event in events.new():
        name = event.pop("event")
        told.append(name)
        event.pop("time", None)
        if name == "note":
            audience.note(event["text"])
        else:
            audience.event(name, **event)
    return told


def _meant(directory: RunDirectory) -> LlmforgeError | None:
    """Give what a worker raised on purpose, if one did."""
    path = directory.path / FAILURE
    if not path.is_file():
        return None
    failure = json.loads(path.read_text(encoding="utf-8"))
    kind = getattr(errors, failure["kind"], RunError)
    assert issubclass(kind, LlmforgeError)
    return kind(failure["message"])


def _import_ray() -> Any:
    """Import Ray, as quiet as it can be. Raises ConfigError where it is not installed."""
    os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
    require_ray(
        "num_devices: several devices, DeepSpeed and FSDP2 run on Ray", ", or set num_devices: 1 and parallel: auto"
    )
    import ray
    import ray.train

    return ray


@contextmanager
def _held(ray: Any, resources: Mapping[str, float]) -> Iterator[None]:
    """Hold resources while the workers run: Ray Train gives every worker the same, and these are the first one's."""
    if not resources:
        yield
        return
    group = ray.util.placement_group([dict(resources)])
    ray.get(group.ready())
    try:
        yield
    finally:
        ray.util.remove_placement_group(group)


def _nodes(ray: Any) -> list[dict[str, float]]:
    """Give the resources of every node that is there to stay."""
    from llmforge.jobs.notices import draining_nodes

    leaving = draining_nodes()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def _holds(node: Mapping[str, float], request: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount for name, amount in request.items())


def _own_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_words(resources: Mapping[str, float]) -> str:
    shown = {k: v for k, v in resources.items() if not k.startswith(("node:", "object_store_memory"))}
    return ", ".join(f"{v / 2**30:.1f} GiB memory" if k == "memory" else f"{v:g} {k}" for k, v in sorted(shown.items()))


def _reason(error: BaseException) -> str:
    """Put what Ray says of lost workers into one line: of one that hangs or died, rather than of those that miss it."""
    failures = dict(getattr(error, "worker_failures", {}))
    kinds = {type(failure).__name__: rank for rank, failure in failures.items()}
    hanging, dead = kinds.get("WorkerHealthCheckTimeoutError"), kinds.get("WorkerHealthCheckFailedError")
    if hanging is not None:
        return f"worker {hanging} does not answer any more"
    if dead is not None:
        return f"worker {dead} died: {_telling_line(failures[dead])}"
    if failures:
        rank = min(failures)
        return f"worker {rank}: {_telling_line(failures[rank])}"
    return _telling_line(error)


def _telling_line(error: BaseException) -> str:
    """Give the last line that names an error, without what Ray puts in front of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    named = [line for line in lines if "Error" in line or "died" in line or "killed" in line]
    return (named or lines)[-1].rpartition("Worker exit detail: ")[2][:200]
