"""Two hosts on this machine: network namespaces with a cable between them, each with a Ray node of its own."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny_runs import environment

PORT = 6379
HEAD, OTHER = "10.77.0.1", "10.77.0.2"
# A node that does not answer counts as lost after some seconds, and not after half a minute.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def can_make_hosts() -> bool:
    """Say whether this user may make network namespaces, and the commands for it are there."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    return subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0


class Hosts:
    """Two hosts, `head` and `other`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names = {"head": f"llmforge-{os.getpid()}-a", "other": f"llmforge-{os.getpid()}-b"}

    def run(self, host: str, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        return subprocess.run(self._on(host, *command), env=self._environment(env), text=True, capture_output=True)

    def start(self, host: str, *command: str, **env: str) -> subprocess.Popen[str]:
        """Start a command on a host."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(self._on(host, *command), env=self._environment(env), text=True, **pipes)

    def start_ray(self, host: str) -> None:
        """Start a Ray node with one CPU; the head first."""
        first = host == "head"
        where = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self._directory}"]
        done = self.run(
            host,
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--disable-usage-stats"),
            *(where if first else [f"--address={HEAD}:{PORT}"]),
            f"--node-ip-address={HEAD if first else OTHER}",
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def cut(self, *, cable: bool) -> None:
        """Cut the cable between the hosts, or put it back."""
        state = "down" if cable else "up"
        _ip("-n", self._names["other"], "link", "set", "eth0", state)

    def _on(self, host: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self._names[host], *command]

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        return {**environment(), **QUICK, "RAY_AUTH_MODE": "disabled", "GLOO_SOCKET_IFNAME": "eth0", **more}

    def make(self) -> None:
        first, second = self._names.values()
        for name in (first, second):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in ((first, HEAD), (second, OTHER)):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def remove(self) -> None:
        for name in self._names.values():
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in found:
                subprocess.run(["kill", "-9", pid], capture_output=True)
            time.sleep(0.2)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextmanager
def two_hosts(directory: Path) -> Iterator[Hosts]:
    """Give two hosts; their processes end with the block."""
    hosts = Hosts(directory)
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stderr)
