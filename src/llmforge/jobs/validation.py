"""Checks everything about a run that can be known without weights, and says what it would be."""

from typing import Any

from llmforge.config import LoadedConfig


def validate_run(loaded: LoadedConfig) -> dict[str, Any]:
    """Prepare a run short of its weights; give its rows, tokens and steps, and `notes` for a person.

    Raises:
        InputError: what `finetune` would refuse before loading weights.
    """
    from llmforge.train.prepare import prepare_run
    from llmforge.train.run import check_model

    notes = Notes()
    for note in loaded.notes:
        notes.note(note)
    preparation = prepare_run(loaded, notes)
    check_model(preparation)
    ledger = preparation.train.dataset.ledger
    config = preparation.config
    return {
        "rows": ledger.rows,
        **ledger.counts,
        "samples": len(preparation.train.dataset),
        "tokens": int(preparation.train.dataset.lengths.sum()),
        "trained_tokens": int(preparation.train.dataset.trained_tokens.sum()),
        "context_length": config.data.context_length,
        "epochs": config.optimization.num_epochs,
        "steps": preparation.total_steps,
        "notes": notes.lines,
    }


class Notes:
    """Collects notes; validation has no other events."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def event(self, event: str, **fields: Any) -> None:
        raise AssertionError("nothing is trained here")

    def note(self, text: str) -> None:
        self.lines.append(text)
