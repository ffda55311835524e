"""Encodes rows for `data.prepare`, in this process or in a worker; kept apart so that workers import no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmforge.data import RowProblem
from llmforge.data.samples import Sample
from llmforge.errors import ConversationError
from llmforge.prompt.encoder import Encoder, Trained


@dataclass(frozen=True)
class RowEncoder:
    """Encodes rows in messages form; a row that the format cannot express becomes a `RowProblem`."""

    encoder: Encoder
    trained: Trained

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Sample] | RowProblem]:
        return [
            RowProblem(str(result)) if isinstance(result, ConversationError) else result
            for result in self.encoder.encode_conversations(rows, self.trained)
        ]

    def fingerprint(self) -> str:
        """Hash all that decides what a row becomes."""
        return f"{self.encoder.fingerprint()}-{self.trained}"
