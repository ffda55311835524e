"""Finds the worker that the others wait for: slow, not dead."""

from collections.abc import Callable
from statistics import median
from typing import Any

SLOWER = 1.5  # times as long as the others
STEPS = 10  # in a row; single steps are slow for many reasons


class Stragglers:
    """A reporter that watches how long each worker computes, and says once of each that it holds up the others.

    It cannot see who is slow where all wait for each other within every layer (fsdp2, ZeRO 3): all are busy as long.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._in_a_row: dict[int, int] = {}

    def event(self, event: str, **fields: Any) -> None:
        """Look at a step's workers."""
        workers = fields.get("workers", ()) if event == "step" else ()
        for worker in workers:
            others = median(other["busy_seconds"] for other in workers if other is not worker)
            rank, factor = worker["worker"], worker["busy_seconds"] / max(others, 1e-9)
            self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1 if factor > SLOWER else 0
            if self._in_a_row[rank] == STEPS:
                self._note(
                    f"worker {rank} takes {factor:.1f} times as long as the others, who wait for it; see what else its "
                    "machine does"
                )

    def note(self, text: str) -> None:
        """Notes say nothing of workers."""
