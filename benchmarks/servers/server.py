"""What the benchmark knows of every server: how its environment is made, and how it is started on a model."""

import json
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.program import Command, Environment


@dataclass(frozen=True)
class Start:
    """What a server is given. `directory` is its own, and empty; `clients` is the most that will ask at a time.

    `model` is a directory of fp32 weights and the tokenizer, `gguf` the quantised file that they were made from.
    """

    model: Path
    gguf: Path
    directory: Path
    port: int
    threads: int
    clients: int
    context: int

    @property
    def base(self) -> str:
        """The address without `/v1`."""
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True)
class Server:
    """A server, or a way to start it, as one line of the results.

    `key` names it on the command line, `title` in the results. `packages` are those whose versions are recorded. `note`
    says what about its work is not the same as the others'. It is ready when `GET /health` answers with 200.
    """

    key: str
    title: str
    environment: Environment | None = None
    packages: Sequence[str] = ("torch", "transformers")
    note: str = ""

    def python(self) -> Path:
        """Give the interpreter that has this server.

        Raises:
            NotInstalledError: it cannot be installed on this machine.
        """
        return Path(sys.executable) if self.environment is None else self.environment.python()

    def command(self, start: Start) -> Command:
        """Say how it is started; the words come after the interpreter."""
        raise NotImplementedError

    def model_name(self, start: Start) -> str:
        """Give the name that requests call the model by."""
        with urllib.request.urlopen(f"{start.base}/v1/models", timeout=10) as response:
            return json.load(response)["data"][0]["id"]
