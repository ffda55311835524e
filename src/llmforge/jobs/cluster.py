"""Trains on workers of Ray Train: starts Ray here or joins a cluster, watches, and starts again what was lost.

The workers are plain torch programs (`jobs/worker.py`). They write the run's events into its directory, which every
worker sees; what they write is read here for the display. No progress goes through `ray.train.report`: each report
waits for Ray's next poll. A worker that is lost costs the time since the last checkpoint: all of them start again from
it, `max_failures` times.
"""

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmforge import errors
from llmforge.config.resolved import DevicesSection
from llmforge.errors import ConfigError, LlmforgeError, RunError
from llmforge.jobs.events import EventLog, EventTail
from llmforge.jobs.interruptions import remember_interrupts
from llmforge.jobs.run_directory import RunDirectory
from llmforge.jobs.worker import FAILURE, STOP, Orders, work
from llmforge.train.reporter import Reporter

_SECONDS_BETWEEN_LOOKS = 0.2
# Ray Train's controller looks at its workers every 2 seconds by default, and waits for as long at every turn.
_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Placement:
    """What Ray is asked for: workers, what each of them needs, and what is held for the first one besides."""

    workers: int
    each: Mapping[str, float]
    extra: Mapping[str, float]

    @classmethod
    def of(cls, devices: DevicesSection, workers: int, *, has_gpu: bool, cores: int) -> "Placement":
        """Give one GPU to each worker, or a share of a machine's cores where there is none."""
        own: dict[str, float] = {"GPU": 1.0, "CPU": 1.0} if has_gpu else {"CPU": float(max(1, cores // workers))}
        return cls(workers, {**own, **devices.worker_resources}, devices.trainer_resources)

    def check(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """Find out whether nodes with these resources can ever hold the workers.

        Raises:
            ConfigError: they cannot; says what is asked and what there is.
        """
        left = [dict(node) for node in nodes]
        for request in [self.extra, *[self.each] * self.workers]:
            place = next((node for node in left if all(node.get(k, 0.0) >= v for k, v in request.items())), None)
            if place is None:
                there = "; ".join(_in_words(node) for node in nodes) or "no nodes"
                raise ConfigError(
                    f"num_devices: {self.workers} workers of {_in_words(self.each)} each"
                    + (f" and {_in_words(self.extra)} for the first" if self.extra else "")
                    + f" do not fit into the cluster, whose nodes have {there}. Lower num_devices, change "
                    "worker_resources, or add nodes; where the cluster grows by itself, use "
                    "`llmforge anyscale finetune --wait`"
                )
            for key, value in request.items():
                place[key] = place.get(key, 0.0) - value


def train_on_ray(
    directory: RunDirectory,
    devices: DevicesSection,
    audience: Reporter,
    *,
    workers: int,
    allow_unproven: bool,
    wait: bool = False,
    stop_after: int | None = None,
) -> None:
    """Train a prepared run on workers until its artifact is there.

    Args:
        directory: of the run, on storage that every worker sees under the same path.
        workers: how many; the config's number, or another one for a run that is resumed.
        wait: on a cluster that grows by itself, for resources that it does not have yet.
        stop_after: the step after which the workers stop as for ctrl-C.

    Raises:
        ConfigError: Ray is not installed, or the cluster can never hold the workers.
        InputError, RunError: as the workers raised it, or they were lost too often.
    """
    ray = _import_ray()
    with _connected(ray, workers, audience):
        placement = Placement.of(devices, workers, has_gpu=_has_gpu(ray), cores=_cores(ray))
        if wait:
            audience.note(f"asking the cluster for {workers} workers of {_in_words(placement.each)} each")
        else:
            placement.check([node["Resources"] for node in ray.nodes() if node["Alive"]])
        orders = Orders(str(directory.path), allow_unproven, stop_after)
        with _held(ray, placement.extra):
            for attempt in range(devices.max_failures + 1):
                error = _attempt(ray, placement, orders, directory, audience)
                if error is None:
                    return
                _raise_if_meant(directory)
                if attempt == devices.max_failures:
                    raise RunError(
                        f"workers were lost {attempt + 1} times; max_failures is {devices.max_failures}. The last "
                        f"time: {_first_line(error)}. The run is kept: llmforge finetune --resume {directory.path}"
                    ) from error
                with EventLog(directory.events) as events:
                    reason = _first_line(error)
                    events.event("restarted", attempt=attempt + 1, of=devices.max_failures, reason=reason)
                audience.note(
                    f"a worker was lost ({reason}); all start again from the last checkpoint, "
                    f"{attempt + 1} of {devices.max_failures} times"
                )


def _attempt(
    ray: Any, placement: Placement, orders: Orders, directory: RunDirectory, audience: Reporter
) -> BaseException | None:
    """Run the workers once, showing what they write; give the error that they ended with."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    for name in (FAILURE, STOP):
        (directory.path / name).unlink(missing_ok=True)
    storage = directory.path / ".ray"
    gpu = "GPU" in placement.each
    trainer = TorchTrainer(
        work,
        train_loop_config=orders.as_dict(),
        scaling_config=ScalingConfig(
            num_workers=placement.workers, use_gpu=gpu, resources_per_worker=dict(placement.each)
        ),
        # Counts travel between the hosts' memories, gradients between the devices.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
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
    with remember_interrupts(audience.note) as interrupted:
        thread.start()
        while thread.is_alive():
            thread.join(_SECONDS_BETWEEN_LOOKS)
            _tell(events, audience)
            if interrupted():
                (directory.path / STOP).touch()
    _tell(events, audience)
    shutil.rmtree(storage, ignore_errors=True)
    return ended[0]


def _tell(events: EventTail, audience: Reporter) -> None:
    for event in events.new():
        name = event.pop("event")
        event.pop("time", None)
        if name == "note":
            audience.note(event["text"])
        else:
            audience.event(name, **event)


def _raise_if_meant(directory: RunDirectory) -> None:
    """Raise what a worker raised on purpose: to start it again would end in the same way."""
    path = directory.path / FAILURE
    if not path.is_file():
        return
    failure = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    kind = getattr(errors, failure["kind"], RunError)
    assert issubclass(kind, LlmforgeError)
    raise kind(failure["message"])


def _import_ray() -> Any:
    os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
    try:
        import ray
        import ray.train
    except ImportError as error:
        raise ConfigError(
            "num_devices: several devices, DeepSpeed and FSDP2 run on Ray, which is not installed; "
            "run `pip install 'llmforge[ray]'`, or set num_devices: 1 and parallel: auto"
        ) from error
    return ray


@contextmanager
def _connected(ray: Any, workers: int, audience: Reporter) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names or that runs here, or start Ray in this machine and stop it again."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS") or _cluster_here()
    context = None
    if address not in (None, "local"):
        try:
            context = ray.init(address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if os.environ.get("RAY_ADDRESS"):
                raise ConfigError(
                    f"RAY_ADDRESS is {address}, and no Ray cluster answers there ({_first_line(error)}); start one, or "
                    "unset it"
                ) from None
    place = "joined the Ray cluster"
    if context is None:
        context = _start_here(ray, max(workers, _own_cores()), audience, options)
        place = "started Ray on this machine"
    dashboard = getattr(context, "dashboard_url", None)
    audience.note(f"{place}" + (f"; its dashboard is http://{dashboard}" if dashboard else ""))
    try:
        yield
    finally:
        ray.shutdown()


def _start_here(ray: Any, cpus: int, audience: Reporter, options: Mapping[str, Any]) -> Any:
    """Start Ray on this machine. It gives itself 30 seconds for that, which on a busy machine may need a second try.

    Raises RunError.
    """
    try:
        return ray.init("local", num_cpus=cpus, **options)
    except Exception as error:  # of no type of its own
        audience.note(f"Ray did not start ({_first_line(error)}); trying once more")
        ray.shutdown()
    try:
        return ray.init("local", num_cpus=cpus, **options)
    except Exception as error:
        ray.shutdown()
        logs = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")
        raise RunError(
            f"Ray could not be started on this machine, in two tries: {_first_line(error)}. {logs} may say why; where "
            "the machine is busy, try again later, or start a cluster with `ray start --head` and set RAY_ADDRESS: auto"
        ) from error


def _cluster_here() -> str | None:
    """Give the address of the cluster that `ray start` started on this machine, if it did.

    Ray's own "auto" also finds what any other program has started for itself.
    """
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    return file.read_text(encoding="utf-8").strip() or None if file.is_file() else None


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


def _has_gpu(ray: Any) -> bool:
    return bool(ray.cluster_resources().get("GPU"))


def _cores(ray: Any) -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def _own_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_words(resources: Mapping[str, float]) -> str:
    shown = {k: v for k, v in resources.items() if not k.startswith(("node:", "object_store_memory"))}
    return ", ".join(f"{v / 2**30:.1f} GiB memory" if k == "memory" else f"{v:g} {k}" for k, v in sorted(shown.items()))


def _first_line(error: BaseException) -> str:
    """Put what Ray says of a lost worker into one line: the last of its lines that names an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or "died" in line or "killed" in line]
    return (named or lines or [type(error).__name__])[-1][:200]
