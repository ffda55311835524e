"""`transformers serve`: as it is, and with continuous batching.

With continuous batching it takes 60 % of the free memory for its cache unless it is told a bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from peers.program import Command, Environment
from servers.server import Server, Start

VERSION = "5.23.0"
ENVIRONMENT = Environment("transformers-serve", [f"transformers[serving]=={VERSION}"])
CACHE_SHARE = 0.1  # of the free memory


@dataclass(frozen=True)
class TransformersServe(Server):
    """`options` are those after the model."""

    options: Sequence[str] = ()

    def command(self, start: Start) -> Command:
        script = self.python().parent / "transformers"
        arguments = ["serve", str(start.model), "--device", "cpu", "--dtype", "float32", "--port", str(start.port)]
        return Command([str(script), *arguments, *self.options])

    def model_name(self, start: Start) -> str:
        return str(start.model)  # /v1/models lists hub models only


SERVERS = (
    TransformersServe(
        "transformers",
        "transformers serve",
        ENVIRONMENT,
        note="answers one request after another",
    ),
    TransformersServe(
        "transformers-cb",
        "transformers serve --continuous-batching",
        ENVIRONMENT,
        note=f"cache bounded to {CACHE_SHARE:.0%} of the free memory; its default is 60 %",
        options=("--continuous-batching", "--cb-max-memory-percent", str(CACHE_SHARE)),
    ),
)
