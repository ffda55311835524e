"""Answers a file of conversations. What is answered is kept on the way, so that a killed command goes on where it was.

Beside the output lies a hidden file until all is done: a line for each answer, in the order in which they were ready.
Its name is made of all that decides the answers, so that another command never continues it.
"""

import fcntl
import hashlib
import json
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from llmforge import __version__
from llmforge.atomic import write_atomically
from llmforge.errors import ConversationError, DataError, InputError, Interrupted
from llmforge.jobs.run import find_artifact, find_served, load_base, load_model

if TYPE_CHECKING:
    from llmforge.prompt import Message


@dataclass(frozen=True)
class Work:
    """What decides answers, but for the conversations: a run or an artifact, and how it is asked."""

    path: str
    base: bool
    batch_size: int
    options: Mapping[str, Any]


class Answerer:
    """A loaded model that answers conversations as a `Work` says."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._models, self._model = load_model(work.path, note=note, max_batch=work.batch_size)
        if work.base:
            self._model = load_base(self._models, self._model, work.path)

    def answer(self, conversations: "Sequence[Sequence[Message]]") -> Iterator[tuple[int, str]]:
        """Answer conversations; gives each one's place with its answer when it is ready.

        Raises:
            ConversationPlaceError: one cannot be rendered; nothing has been answered then.
        """
        from llmforge.serve.offline import answer_all

        prompts = []
        for place, messages in enumerate(conversations):
            try:
                prompts.append(self._model.encode(messages))
            except ConversationError as error:
                raise ConversationPlaceError(place, str(error)) from error
        yield from answer_all(self._model, prompts, self._work.options, at_once=self._work.batch_size)

    def close(self) -> None:
        """Stop the engine."""
        self._models.close()


class ConversationPlaceError(Exception):
    """A conversation, known by its place, cannot be rendered."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(place, reason)
        self.place, self.reason = place, reason


def generate(
    path: str | Path,
    source: str,
    target: Path,
    *,
    batch_size: int,
    base: bool,
    options: Mapping[str, Any],
    num_devices: int = 1,
) -> int:
    """Answer each row of a JSONL file and write the rows with their answer as `generated`; return their number.

    A trailing assistant message, as validation data have it, is what the model is asked for, not part of the prompt.

    Args:
        num_devices: more than one are workers of Ray, each with the model.

    Raises:
        InputError: there is no finished run at `path`, or a row cannot be used.
        Interrupted: ctrl-C; the same command continues.
    """
    find_artifact(path)
    if not target.parent.is_dir():
        raise InputError(f"--output {target}: the directory {target.parent} does not exist; make it first")
    if target.is_dir():
        raise InputError(f"--output {target} is a directory; give the name of a file in it")
    rows, places = _read_rows(source)
    work = Work(str(path), base, batch_size, dict(options))
    conversations = [
        row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"] for row in rows
    ]
    with _partial(target, _digest(work, conversations)) as partial:
        answers = partial.answers
        left = [place for place in range(len(rows)) if place not in answers]
        if answers and left:
            note(f"{len(answers):,} of {len(rows):,} answers are there already")
        asked = [conversations[place] for place in left]
        try:
            with closing(_answers(work, asked, num_devices)) as ready:
                for place, answer in ready if left else ():
                    partial.add(left[place], answer)
                    _count(len(answers), len(rows))
        except ConversationPlaceError as error:
            file, line = places[left[error.place]]
            raise DataError(error.reason, file=file, line=line) from error
        except KeyboardInterrupt:
            kept = f"{len(answers):,} of {len(rows):,} answers are kept"
            raise Interrupted(f"interrupted; {kept}, and the same command continues") from None
        lines = [
            json.dumps({**row, "generated": answers[place]}, ensure_ascii=False) + "\n"
            for place, row in enumerate(rows)
        ]
        write_atomically(target, "".join(lines))
        partial.path.unlink()
    return len(rows)


def _answers(work: Work, conversations: "Sequence[Sequence[Message]]", num_devices: int) -> Generator[tuple[int, str]]:
    if num_devices == 1:
        with closing(Answerer(work)) as answerer:
            yield from answerer.answer(conversations)
        return
    from llmforge.jobs.ray_answers import answers_on_ray

    yield from answers_on_ray(work, conversations, num_devices)


def _read_rows(source: str) -> tuple[list[dict[str, Any]], list[tuple[str, int]]]:
    """Read the rows to answer, and where each of them stands."""
    from llmforge.data import RowLayout, RowProblem
    from llmforge.data.blocks import read_rows
    from llmforge.data.files import find_files

    rows, places = [], []
    for row in read_rows(find_files(source, Path.cwd()), RowLayout(needs_assistant=False)):
        if isinstance(row.content, RowProblem):
            raise DataError(row.content.reason, file=row.file, line=row.line)
        rows.append(row.content)
        places.append((row.file, row.line))
    return rows, places


def _digest(work: Work, conversations: Sequence[Any]) -> str:
    """Hash all that decides the answers: the model's files, what it is asked, and how."""
    model, loading = find_served(work.path)
    text = {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(model.directory.glob("*"))
        if path.name in ("prompt_format.yaml", "chat_template.jinja")
    }
    deciding = [__version__, model.content_hash(), text, loading.dtype, work.base, dict(work.options), conversations]
    content = json.dumps(deciding, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@dataclass
class _Partial:
    """The answers that are there, by the place of their row, and the file that keeps them."""

    path: Path
    answers: dict[int, str]
    file: TextIO

    def add(self, place: int, answer: str) -> None:
        self.answers[place] = answer
        self.file.write(json.dumps({"row": place, "generated": answer}) + "\n")
        self.file.flush()


@contextmanager
def _partial(target: Path, digest: str) -> Iterator[_Partial]:
    """Open the answers that a command was to write to `target`; what a kill left of a line is cut off."""
    path = target.with_name(f".{target.name}.{digest}.partial")
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another command is answering the same rows to {target}; wait for it") from None
        file.seek(0)
        whole, _, cut = file.read().rpartition("\n")
        if cut:
            file.truncate(len(whole.encode()) + 1 if whole else 0)
        lines = [json.loads(line) for line in whole.splitlines()]
        yield _Partial(path, {line["row"]: line["generated"] for line in lines}, file)


def note(text: str) -> None:
    """Tell the user something."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def _count(done: int, rows: int) -> None:
    """Show on a terminal how far it is."""
    if sys.stderr.isatty():
        print(f"\r{done:,} of {rows:,} answers", end="\r\x1b[K" if done == rows else "", file=sys.stderr, flush=True)
