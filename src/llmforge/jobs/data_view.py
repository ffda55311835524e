"""Shows rows as the model will see them: token by token, with the reason for each token's weight."""

import itertools
import os
from collections.abc import Iterable
from typing import Any, TextIO

from llmforge.config import LoadedConfig

COLOURS = {"trained": "32", "weight 0": "33", "prompt": "2"}  # ANSI: green, yellow, dim


def explain_rows(loaded: LoadedConfig, count: int) -> list[dict[str, Any]]:
    """Encode the first rows of the training data and say why each token counts or does not.

    Each row has `file`, `line`, and either `problem` or `samples`: lists of pieces
    {reason, weight, tokens: [{id, text}]}.

    Raises:
        InputError: the data, tokenizer or prompt format cannot be used.
    """
    from llmforge.config.capabilities import refuse_unavailable_task
    from llmforge.data import RowLayout, RowProblem
    from llmforge.data.blocks import read_rows
    from llmforge.data.files import find_files
    from llmforge.errors import ConversationError
    from llmforge.tasks import TASKS
    from llmforge.train.prepare import load_encoder

    refuse_unavailable_task(loaded)
    config = loaded.config
    task = TASKS[config.task or "causal_lm"]
    layout = RowLayout(config.data_format, config.columns, task.needs_assistant)
    files = find_files(config.train_path, loaded.path.parent)
    encoder = load_encoder(loaded)
    explained = []
    for row in itertools.islice(read_rows(files, layout), count):
        shown: dict[str, Any] = {"file": row.file, "line": row.line}
        if isinstance(row.content, RowProblem):
            shown["problem"] = row.content.reason
        else:
            result = encoder.explain([row.content], task.trained)[0]
            if isinstance(result, ConversationError):
                shown["problem"] = str(result)
            else:
                shown["samples"] = [
                    [
                        {
                            "reason": piece.reason,
                            "weight": piece.weight,
                            "tokens": [{"id": token, "text": encoder.decode([token])} for token in piece.input_ids],
                        }
                        for piece in pieces
                    ]
                    for pieces in result
                ]
        explained.append(shown)
    return explained


def print_rows(rows: Iterable[dict[str, Any]], stream: TextIO) -> None:
    """Print explained rows: tokens separated by `|`, trained ones green on a terminal, in brackets elsewhere."""
    colour = stream.isatty() and "NO_COLOR" not in os.environ
    for row in rows:
        print(f"{row['file']}:{row['line']}", file=stream)
        if "problem" in row:
            print(f"  problem: {row['problem']}\n", file=stream)
            continue
        for number, pieces in enumerate(row["samples"], 1):
            counts = ", ".join(f"{len(piece['tokens'])} {piece['reason']}" for piece in pieces)
            print(f"  sample {number} of {len(row['samples'])}: {counts}", file=stream)
            for piece in pieces:
                print("    " + _piece(piece, colour), file=stream)
        print(file=stream)


def _piece(piece: dict[str, Any], colour: bool) -> str:
    text = "|".join(token["text"].replace("\n", "\\n").replace("\r", "\\r") for token in piece["tokens"])
    label = f"{piece['reason']:<9}"
    if colour:
        return f"{label} \x1b[{COLOURS[piece['reason']]}m{text}\x1b[0m"
    return f"{label} [{text}]" if piece["reason"] == "trained" else f"{label}  {text}"
