"""Conversations with a run's model: in a terminal, or a file of them at once."""

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from llmforge.atomic import write_atomically
from llmforge.errors import DataError, InputError
from llmforge.jobs.run import find_artifact

HELP = "Type a message; /clear starts over, /exit or ctrl-D ends."


def chat(path: Path, *, system: str | None, options: Mapping[str, Any]) -> None:
    """Read messages from stdin and stream the model's answers to stdout, until the input ends.

    Raises:
        InputError: there is no finished run at `path`.
    """
    from llmforge.serve.engine import Engine

    engine = Engine.load(find_artifact(path))
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while True:
        try:
            text = input("> " if interactive else "")
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/clear":
            messages = list(opening)
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in engine.stream(messages, **options):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:  # ends this answer, not the conversation
            pass
        print()
        messages.append({"role": "assistant", "content": answer})


def generate(
    path: Path, source: Path, target: Path, *, batch_size: int, base: bool, options: Mapping[str, Any]
) -> int:
    """Answer each row of a JSONL file and write the rows with their answer as `generated`; return their number.

    A trailing assistant message, as validation data have it, is what the model is asked for, not part of the prompt.

    Raises:
        InputError: there is no finished run at `path`, or a row cannot be used.
    """
    from llmforge.data import RowLayout, RowProblem
    from llmforge.data.blocks import read_rows
    from llmforge.data.files import find_files
    from llmforge.serve.engine import Engine

    artifact = find_artifact(path)
    if not target.parent.is_dir():
        raise InputError(f"--output {target}: the directory {target.parent} does not exist")
    rows = []
    for row in read_rows(find_files(str(source), Path.cwd()), RowLayout(needs_assistant=False)):
        if isinstance(row.content, RowProblem):
            raise DataError(row.content.reason, file=row.file, line=row.line)
        rows.append(row.content)
    prompts = [
        row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"] for row in rows
    ]
    engine = Engine.load(artifact)
    with engine.without_adapter() if base else nullcontext():
        answers = engine.generate(prompts, batch_size=batch_size, **options)
    lines = [
        json.dumps({**row, "generated": answer}, ensure_ascii=False) + "\n"
        for row, answer in zip(rows, answers, strict=True)
    ]
    write_atomically(target, "".join(lines))
    return len(rows)
