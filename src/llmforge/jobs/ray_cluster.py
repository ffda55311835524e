"""Reaches a Ray cluster: as a member of it, and as a client from anywhere. What goes wrong is said without Ray's words.

Ray is imported here only when a cluster is asked for.
"""

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmforge.errors import InputError, RunError

SECONDS_TO_ANSWER = 10
ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray puts them above any argument
TOKEN_FILE = Path("~/.ray/auth_token")  # where Ray keeps it
START = "start one with `ray start --head`, or name one with --address or RAY_ADDRESS"


@contextmanager
def connected(
    address: str | None = None, *, note: Callable[[str], None], cpus_of_own: int | None = None
) -> Iterator[None]:
    """Make this process a driver on a Ray cluster: the one at `address`, in RAY_ADDRESS, or running on this machine.

    A process that is connected already stays so. `note` hears where the dashboard is.

    Args:
        cpus_of_own: where no cluster is named and none runs here, start Ray on this machine with so many CPUs, and stop
            it at the end.

    Raises:
        InputError: Ray is not installed, the address cannot be one of a cluster, or nothing answers there.
    """
    require_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    named = address or os.environ.get("RAY_ADDRESS")
    place = named or _cluster_here() or ("auto" if cpus_of_own is None else "local")
    if "://" in place:
        raise InputError(
            f"{place} is an address for clients of a Ray cluster, and this command is to run on one of its machines; "
            "`llmforge anyscale finetune --job` submits it from here. Or give the address of the cluster itself "
            "(host:6379)"
        )
    require_answer(place)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with ray_address(address):
        try:
            context = _start_here(ray, cpus_of_own, note, options) if place == "local" else ray.init(place, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = "no Ray cluster" if place == "auto" else f"the Ray cluster at {place}"
            raise InputError(
                f"{where}: {_first_line(error)}; {START}. If it asks for a token, set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN"
            ) from error
    done = "started Ray on this machine" if place == "local" else "joined the Ray cluster"
    dashboard = context.dashboard_url
    note(f"{done}; its dashboard is http://{dashboard}" if dashboard else done)
    try:
        yield
    finally:
        ray.shutdown()


def _start_here(ray: Any, cpus: int | None, note: Callable[[str], None], options: Mapping[str, Any]) -> Any:
    """Start Ray on this machine. It gives itself 30 seconds for that, which on a busy machine may need a second try.

    Raises RunError.
    """
    # Ray's own default is 15: beside anything else that computes here, a run on two devices would get little of the
    # processor, while one on a single device, which needs no Ray, gets its share.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        return ray.init("local", num_cpus=cpus, **options)
    except Exception as error:  # of no type of its own
        note(f"Ray did not start ({_first_line(error)}); trying once more")
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


def require_ray(need: str = "this needs Ray", instead: str = "") -> None:
    """Make Ray ready to be imported.

    Where nothing is said of it, a cluster is shown the token that this user has for one: Ray has clusters ask for it as
    soon as it exists, but does not show it to one that is named. Ray reads the environment when it is imported.

    Raises:
        InputError: it is not installed; says what needs it, and what to do instead.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError(f"{need}, which is not installed; run `pip install 'llmforge[ray]'`{instead}")
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if "ray" not in sys.modules and (given or TOKEN_FILE.expanduser().is_file()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def require_answer(address: str) -> None:
    """Raise InputError if an address (`host:port` or a URL) is none, or nothing accepts connections there."""
    if address in ("auto", "local"):
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        host = port = None
    if not host or not port:
        raise InputError(
            f"{address!r} is not the address of a Ray cluster; give http://host:8265 (its dashboard) or host:6379"
        )
    try:
        socket.create_connection((host, port), timeout=SECONDS_TO_ANSWER).close()
    except OSError as error:
        raise InputError(f"nothing answers at {host}:{port} ({error.strerror or error}); {START}") from None


@contextmanager
def ray_address(address: str | None) -> Iterator[None]:
    """Let an address that was given win over the environment, which Ray itself has the other way round."""
    before = {name: os.environ.get(name) for name in ADDRESS_VARIABLES}
    if address is not None:
        for name in ADDRESS_VARIABLES:
            os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _cluster_here() -> str | None:
    """Give the address of the cluster that `ray start` started on this machine, if it still answers.

    Ray's own "auto" also finds what any other program has started for itself.
    """
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        address = file.read_text(encoding="utf-8").strip()
        require_answer(address)
    except (OSError, InputError):  # it has ended, and its file is left
        return None
    return address


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
