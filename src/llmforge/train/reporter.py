"""How the training program tells the outside what happens. It knows no file, no terminal and no service."""

from typing import Any, Protocol


class Reporter(Protocol):
    """Receives a run's progress; `jobs` implements it for files, terminals and tracking services."""

    def event(self, event: str, **fields: Any) -> None:
        """Record one event (`started`, `step`, `evaluation`, `checkpoint`, `finished`, `failed`); fields fit JSON."""

    def note(self, text: str) -> None:
        """Tell a person one thing, in one line."""


class Unheard:
    """The reporter of what has been said already, or is said by another worker."""

    def event(self, event: str, **fields: Any) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""
