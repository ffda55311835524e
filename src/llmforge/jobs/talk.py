"""A conversation with a run's model in a terminal; with the base model beside it, if that is asked for."""

import contextlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TextIO

from llmforge.errors import InputError
from llmforge.jobs.run import BASE, TUNED, find_artifact, load_base, load_model

if TYPE_CHECKING:
    from llmforge.prompt import Message
    from llmforge.serve.model import ServedModel

QUOTES = '"""'
HELP = f"Type a message (several lines between {QUOTES}); /clear starts over, /exit ends."
COLUMNS_FROM = 80  # characters of a terminal in which two answers have room side by side
_BETWEEN = " │ "


def chat(path: str | Path, *, system: str | None, compare: str | None, options: Mapping[str, Any]) -> None:
    """Read messages from stdin and stream the model's answers to stdout, until the input ends.

    Args:
        compare: "base" has the base model answer, too; each of them remembers its own answers.

    Raises:
        InputError: there is no finished run at `path`.
    """
    if compare not in (None, BASE):
        raise InputError(f"--compare: given {compare}; allowed is {BASE}, the model before training")
    artifact = find_artifact(path)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - line editing and history for input(), where Python has it
        print(f"loading {artifact}", file=sys.stderr)
    loaded, model = load_model(path, note=lambda text: print(f"note: {text}", file=sys.stderr))
    with closing(loaded):
        models = [model] if compare is None else [load_base(loaded, model, path), model]
        model.options(**options)  # what is wrong with them is said before somebody types
        if interactive:
            print(HELP, file=sys.stderr)
        _talk(models, [{"role": "system", "content": system}] if system else [], interactive, options)


def _talk(
    models: "Sequence[ServedModel]", opening: "list[Message]", interactive: bool, options: Mapping[str, Any]
) -> None:
    conversations = [list(opening) for _ in models]
    for text in _messages(interactive):
        if text == "/exit":
            return
        if text == "/clear":
            conversations = [list(opening) for _ in models]
            continue
        for messages in conversations:
            messages.append({"role": "user", "content": text})
        answers = _answer(models, conversations, options)
        for messages, answer in zip(conversations, answers, strict=True):
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()


def _answer(
    models: "Sequence[ServedModel]", conversations: "Sequence[Sequence[Message]]", options: Mapping[str, Any]
) -> list[str]:
    """Stream the answers of all models to stdout, and give them; ctrl-C ends them, not the conversation."""
    shown = _side_by_side(sys.stdout) if len(models) > 1 else _OneAfterTheOther(sys.stdout, [""])
    answers = [""] * len(models)
    asked = []
    try:
        for model, messages in zip(models, conversations, strict=True):
            asked.append(model.answer(model.encode(messages), model.options(**options)))
        pieces: SimpleQueue[tuple[int, str | BaseException | None]] = SimpleQueue()

        def read(place: int) -> None:
            try:
                for piece in asked[place]:
                    pieces.put((place, piece.text))
                pieces.put((place, None))
            except BaseException as error:
                pieces.put((place, error))

        for place in range(len(asked)):
            Thread(target=read, args=(place,), daemon=True).start()
        left = len(asked)
        while left:
            place, piece = pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                left -= 1
                shown.end(place)
            else:
                answers[place] += piece
                shown.add(place, piece)
    except KeyboardInterrupt:
        pass
    finally:
        for answer in asked:
            answer.cancel()
    shown.close()
    return answers


class _OneAfterTheOther:
    """Shows the first text as it comes, what has come of the second meanwhile when the first has ended, and so on."""

    def __init__(self, out: TextIO, titles: Sequence[str]) -> None:
        self._out, self._titles = out, titles
        self._texts = [""] * len(titles)
        self._has_ended = [False] * len(titles)
        self._at = 0
        self._begin()

    def add(self, place: int, text: str) -> None:
        self._texts[place] += text
        if place == self._at:
            self._print(text)

    def end(self, place: int) -> None:
        self._has_ended[place] = True
        while self._at < len(self._titles) and self._has_ended[self._at]:
            self._print("\n")
            self._at += 1
            self._begin()

    def close(self) -> None:
        """Show the rest, where the texts were not ended."""
        for place in range(self._at, len(self._titles)):
            self.end(place)

    def _begin(self) -> None:
        if self._at < len(self._titles):
            title = self._titles[self._at]
            self._print((f"{title}: " if title else "") + self._texts[self._at])

    def _print(self, text: str) -> None:
        print(text, end="", file=self._out, flush=True)


class _Columns:
    """Shows two texts in two columns, line by line, as far as both have come; the line they are at is written anew."""

    def __init__(self, out: TextIO, width: int, titles: Sequence[str]) -> None:
        self._out = out
        self._width = (width - len(_BETWEEN)) // 2
        self._texts = ["", ""]
        self._has_ended = [False, False]
        self._done = 0  # lines that are written for good
        self._write([f"{title}:" for title in titles], is_whole=True)
        self._done = 0

    def add(self, place: int, text: str) -> None:
        self._texts[place] += text
        self._show()

    def end(self, place: int) -> None:
        self._has_ended[place] = True
        self._show()

    def close(self) -> None:
        """Show the rest, where the texts were not ended."""
        self._has_ended = [True, True]
        self._show()

    def _show(self) -> None:
        columns = [self._lines(text) for text in self._texts]
        whole = [len(lines) if ended else len(lines) - 1 for lines, ended in zip(columns, self._has_ended, strict=True)]
        last = (
            max(whole)
            if all(self._has_ended)
            else min(count for count, ended in zip(whole, self._has_ended, strict=True) if not ended)
        )
        for number in range(self._done, last):
            self._write([lines[number] if number < len(lines) else "" for lines in columns], is_whole=True)
        self._done = max(self._done, last)
        if not all(self._has_ended):
            self._write([lines[self._done] if self._done < len(lines) else "" for lines in columns], is_whole=False)

    def _lines(self, text: str) -> list[str]:
        """Break a text into lines of a column's width; more text changes the last line only."""
        from rich.console import Console
        from rich.text import Text

        wrapped = Text(text).wrap(Console(width=self._width), self._width, tab_size=4)
        return [line.plain.rstrip() for line in wrapped] or [""]

    def _write(self, cells: Sequence[str], *, is_whole: bool) -> None:
        from rich.cells import set_cell_size

        left, right = (set_cell_size(cell, self._width) for cell in cells)
        end = "\n" if is_whole else ""
        print(f"\r\x1b[K{left}{_BETWEEN}{right.rstrip()}", end=end, file=self._out, flush=True)


def _side_by_side(out: TextIO) -> "_Columns | _OneAfterTheOther":
    """Show the base model's answer and the tuned one's in columns where the terminal has room for them."""
    width = shutil.get_terminal_size().columns
    if out.isatty() and width >= COLUMNS_FROM:
        return _Columns(out, width, (BASE, TUNED))
    return _OneAfterTheOther(out, (BASE, TUNED))


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
