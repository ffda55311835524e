"""Hears, as a worker of Ray Train, that this worker is to go: by SIGTERM, or because its node is being taken away.

Ray ends a worker that gets SIGTERM. Here it only leaves a notice; the training program asks for it after each step.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ray.train.torch import TorchConfig

SECONDS_BETWEEN_LOOKS = 1.0
_notices: list[str] = []


def notice() -> str | None:
    """Give the reason why this worker is to go, if it is."""
    return _notices[0] if _notices else None


@dataclass
class NoticingTorchConfig(TorchConfig):
    """Torch's process group for Ray Train, of workers that take SIGTERM as a notice."""

    @property
    def backend_cls(self) -> Any:
        """The class that sets up the process group in the workers."""
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        # Training runs in another thread; this is the main one, the only one that may say what a signal does.
        worker_group.execute(_take_sigterm_as_notice)


def _take_sigterm_as_notice() -> None:
    def remember(number: int, frame: FrameType | None) -> None:
        _notices.append(f"a worker on {socket.gethostname()} was told to end (SIGTERM to process {os.getpid()})")

    signal.signal(signal.SIGTERM, remember)


def watch_node(node: str) -> None:
    """Leave a notice once Ray says that a node is being taken away; `node` is its id."""

    def watch() -> None:
        while not _notices:
            deadline = draining_nodes().get(node)
            if deadline is not None:
                seconds = f" within {max(0, deadline / 1000 - time.time()):.0f} s" if deadline else ""
                _notices.append(f"the node {socket.gethostname()} is being taken away{seconds}")
            time.sleep(SECONDS_BETWEEN_LOOKS)

    threading.Thread(target=watch, name="watch-node", daemon=True).start()


def draining_nodes() -> Mapping[str, int]:
    """Give the nodes that Ray is taking away: id → deadline in ms since 1970, 0 for none."""
    from ray._private.state import state  # Ray's own libraries ask here; there is no public way

    nodes: Mapping[str, int] = state.get_draining_nodes()
    return nodes
