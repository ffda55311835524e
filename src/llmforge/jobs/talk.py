"""Conversations with a run's model: in a terminal, or a file of them at once."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from llmforge.atomic import write_atomically
from llmforge.errors import ConversationError, DataError, InputError
from llmforge.jobs.run import find_artifact, load_engine

QUOTES = '"""'
HELP = f"Type a message (several lines between {QUOTES}); /clear starts over, /exit ends."


def chat(path: str | Path, *, system: str | None, options: Mapping[str, Any]) -> None:
    """Read messages from stdin and stream the model's answers to stdout, until the input ends.

    Raises:
        InputError: there is no finished run at `path`.
    """
    artifact = find_artifact(path)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - line editing and history for input(), where Python has it
        print(f"loading {artifact}", file=sys.stderr)
    engine = load_engine(path)
    if interactive:
        print(HELP, file=sys.stderr)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    for text in _messages(interactive):
        if text == "/exit":
            return
        if text == "/clear":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": text})
        answer = ""
        # ctrl-C ends this answer, not the conversation
        with contextlib.suppress(KeyboardInterrupt):
            for piece in engine.stream(messages, **options):
                print(piece, end="", flush=True)
                answer += piece
        print(flush=True)
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()


def _messages(interactive: bool) -> Iterator[str]:
    """Read what the user types: a line, or what stands between two triple quotes, until the input ends."""
    while True:
        try:
            text = input("> " if interactive else "")
            if text.startswith(QUOTES):
                text = text.removeprefix(QUOTES)
                while not text.endswith(QUOTES):
                    text += "\n" + input("… " if interactive else "")
                text = text.removesuffix(QUOTES)
        except (EOFError, KeyboardInterrupt) as end:
            if interactive:
                print(file=sys.stderr)
            if isinstance(end, KeyboardInterrupt):
                raise
            return
        if text:
            yield text


def generate(
    path: str | Path, source: str, target: Path, *, batch_size: int, base: bool, options: Mapping[str, Any]
) -> int:
    """Answer each row of a JSONL file and write the rows with their answer as `generated`; return their number.

    A trailing assistant message, as validation data have it, is what the model is asked for, not part of the prompt.

    Raises:
        InputError: there is no finished run at `path`, or a row cannot be used.
    """
    from llmforge.data import RowLayout, RowProblem
    from llmforge.data.blocks import read_rows
    from llmforge.data.files import find_files

    find_artifact(path)
    if not target.parent.is_dir():
        raise InputError(f"--output {target}: the directory {target.parent} does not exist; make it first")
    if target.is_dir():
        raise InputError(f"--output {target} is a directory; give the name of a file in it")
    rows, prompts, places = [], [], []
    for row in read_rows(find_files(source, Path.cwd()), RowLayout(needs_assistant=False)):
        if isinstance(row.content, RowProblem):
            raise DataError(row.content.reason, file=row.file, line=row.line)
        messages = row.content["messages"]
        rows.append(row.content)
        places.append((row.file, row.line))
        prompts.append(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    engine = load_engine(path)
    for prompt, (file, line) in zip(prompts, places, strict=True):
        try:
            engine.encoder.encode_prompt(prompt)
        except ConversationError as error:
            raise DataError(str(error), file=file, line=line) from error
    with engine.without_adapter() if base else nullcontext():
        answers = engine.generate(prompts, batch_size=batch_size, **options)
    lines = [
        json.dumps({**row, "generated": answer}, ensure_ascii=False) + "\n"
        for row, answer in zip(rows, answers, strict=True)
    ]
    write_atomically(target, "".join(lines))
    return len(rows)
