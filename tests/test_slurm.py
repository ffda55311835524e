"""The SLURM script runs: two nodes on this machine, a stop in the middle, and the job that comes back and goes on."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmforge.jobs.events import read_events
from test_ray import KEYS, assert_same_result, expected, place, steps_in  # noqa: F401 - fixtures
from tiny_runs import environment, write_config

SCRIPT = Path(__file__).parent.parent / "examples" / "cluster" / "slurm.sh"
COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
NODES = ("n1", "n2")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, COMMANDS)),
    reason="needs root, and Debian's packages slurmctld, slurmd and slurm-client",
)


def configuration(directory: Path) -> str:
    """Give slurm.conf for nodes that are all this machine."""
    host = socket.gethostname()
    ports = [free_port() for _ in range(1 + len(NODES))]
    lines = [
        "ClusterName=llmforge",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        f"SlurmUser={getpass.getuser()}",
        f"SlurmdUser={getpass.getuser()}",
        "AuthType=auth/none",
        "CredType=cred/none",
        "AuthInfo=cred_expire=3",  # a job that is requeued waits for so long
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "ReturnToService=2",
        "KillWait=5",
        f"StateSaveLocation={directory}/state",
        f"SlurmdSpoolDir={directory}/spool-%n",
        f"SlurmctldPidFile={directory}/slurmctld.pid",
        f"SlurmdPidFile={directory}/slurmd-%n.pid",
        *(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        ),
        f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
    ]
    return "\n".join(lines) + "\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A cluster of two nodes: runs its commands, and gives what they print."""
    (tmp_path / "state").mkdir()
    (tmp_path / "slurm.conf").write_text(configuration(tmp_path))
    env = environment() | {
        "SLURM_CONF": str(tmp_path / "slurm.conf"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    env.pop("RAY_ADDRESS")  # the script says where

    def run(*command: str | Path) -> str:
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout

    daemons = [("slurmctld", "-D", "-i"), *(("slurmd", "-D", "-N", node) for node in NODES)]
    with started(daemons, env):
        wait_for(lambda: run("sinfo", "--noheader", "--format=%D %t").split() == ["2", "idle"])
        yield run


@contextmanager
def started(commands: list[tuple[str, ...]], env: dict[str, str]) -> Iterator[None]:
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen(command, env=env, **quiet) for command in commands]
    try:
        yield
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(30)


def wait_for(condition: Callable[[], Any], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_that_is_stopped_comes_back_and_goes_on(
    slurm: Callable[..., str],
    place: Path,  # noqa: F811
    model_dir: Path,
    expected: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = write_config(place, model_dir, **KEYS, valid_path=str(place / "valid.jsonl"), custom_model_tag="other")
    run_dir = place / "runs" / "slurm"
    events, log = run_dir / "events.jsonl", tmp_path / "log"
    here = ("--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}")
    job = slurm("sbatch", "--parsable", *here, SCRIPT, config, run_dir).strip()
    try:
        wait_for(lambda: steps_in(events) >= 13)
        slurm("scancel", "--batch", "--signal=TERM", job)
        wait_for(lambda: not slurm("squeue", "--noheader", f"--jobs={job}"))
    finally:
        slurm("scancel", job)
    text = log.read_text()
    assert "stopping after this step to write a checkpoint" in text
    found = read_events(events)
    assert [event["resumed_from"] is None for event in found if event["event"] == "started"] == [True, False], text
    steps = [event["step"] for event in found if event["event"] == "step"]
    assert steps == sorted(set(steps))  # the checkpoint was written at the last of them
    assert_same_result(run_dir, expected)
