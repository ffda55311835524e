"""What `/metrics` shows, in Prometheus' text format."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from llmforge.serve.requests import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAUGES = {
    "running": "Requests that are being answered.",
    "waiting": "Requests that wait for a place.",
    "cached_tokens": "Tokens in the cache of keys and values.",
}


class Metrics:
    """Counters of one server, and a look at its engines whenever they are read.

    Args:
        engines: gives the engines that there are now.
    """

    def __init__(self, engines: Callable[[], Iterable[Engine]]) -> None:
        self._registry = CollectorRegistry()
        self._engines = engines
        self.requests = Counter(
            "llmforge_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter("llmforge_prompt_tokens", "Tokens of prompts.", ["model"], registry=self._registry)
        self.generated_tokens = Counter(
            "llmforge_generated_tokens", "Tokens of answers.", ["model"], registry=self._registry
        )
        self.answers = Counter(
            "llmforge_answers", "Answers by how they ended.", ["model", "finish"], registry=self._registry
        )
        self.first_token = self._seconds("llmforge_time_to_first_token_seconds", "From a request to its first text.")
        self.inter_token = self._seconds("llmforge_inter_token_seconds", "From one piece of text to the next.")
        self.duration = self._seconds("llmforge_answer_seconds", "From a request to the end of its answer.")
        self._registry.register(self)

    def text(self) -> bytes:
        """Write all of it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Ask the engines; called by prometheus-client when `text` is."""
        stats = [engine.stats() for engine in self._engines()]
        for name, help in _GAUGES.items():
            yield GaugeMetricFamily(f"llmforge_{name}", help, value=sum(each.get(name, 0) for each in stats))

    def _seconds(self, name: str, help: str) -> Histogram:
        return Histogram(name, help, ["model"], buckets=_SECONDS, registry=self._registry)
