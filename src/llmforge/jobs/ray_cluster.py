"""Reaches a Ray cluster: as a member of it, and as a client from anywhere. What goes wrong is said without Ray's words.

Ray is imported here only when a cluster is asked for.
"""

import importlib.util
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from llmforge.errors import InputError

SECONDS_TO_ANSWER = 10
ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray puts them above any argument
START = "start one with `ray start --head`, or name one with --address or RAY_ADDRESS"


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Make this process a driver on a Ray cluster: the one at `address`, in RAY_ADDRESS, or running on this machine.

    A process that is connected already stays so.

    Raises:
        InputError: Ray is not installed, the address cannot be one of a cluster, or nothing answers there.
    """
    require_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    given = address or os.environ.get("RAY_ADDRESS") or "auto"
    if "://" in given:
        raise InputError(
            f"{given} is an address for clients of a Ray cluster, and this command is to run on one of its machines; "
            "add --job to submit it from here, or give the address of the cluster itself (host:6379)"
        )
    require_answer(given)
    with ray_address(address):
        try:
            ray.init(address=given, logging_level=logging.WARNING, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"{_place(given)}: {_first_line(error)}; {START}") from error
    try:
        yield
    finally:
        ray.shutdown()


def require_ray() -> None:
    """Raise InputError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("this needs Ray, which is not installed; run `pip install 'llmforge[ray]'`")


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


def _place(address: str) -> str:
    return "no Ray cluster" if address == "auto" else f"the Ray cluster at {address}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
