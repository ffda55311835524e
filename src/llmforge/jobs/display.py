"""Shows a run to the person who started it: a live table on a terminal, plain lines anywhere else.

Everything shown comes from the events that a Reporter receives; nothing here measures, decides or writes files.
"""

import math
import os
import shlex
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TextIO

import psutil

from llmforge.jobs.events import redact
from llmforge.train.reporter import Reporter

if TYPE_CHECKING:  # rich costs a tenth of a second, and piped output never needs it
    from rich.console import RenderableType

_SECONDS_BETWEEN_LINES = 5.0  # plain output: not more often than this,
_LINES_PER_RUN = 100  # nor more often than this in a long run,
_LONGEST_SILENCE = 60.0  # but at least this often while steps are being made
_LABEL_WIDTH = 11


class Line(NamedTuple):
    """One thing to say, under a label that lines up with those above it."""

    label: str
    text: str

    def __str__(self) -> str:
        return f"{self.label:<{_LABEL_WIDTH}} {self.text}"


class Display(Reporter, Protocol):
    """A Reporter for a person. Use it as a context manager, so that the terminal is whole again whatever happens."""

    def progress(self, rows_done: int) -> None:
        """Show how many rows have been prepared (tokenised) so far."""

    def close(self) -> None:
        """Give the terminal back; nothing is shown afterwards."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def open_display(stream: TextIO) -> Display:
    """Make the display that suits the stream: live on a terminal, plain lines for a pipe or a file."""
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveDisplay(stream)
    return PlainDisplay(stream)


class RunView:
    """What has been seen of a run so far, and how it is put into words."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.steps = 0
        self.step = 0
        self.first_step: int | None = None  # of this session: not 1 after a resume
        self.last: dict[str, Any] = {}
        self.first_loss: float | None = None
        self.evaluation: dict[str, Any] | None = None
        self.first_evaluation: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.tokens = 0
        self.trained_tokens = 0
        self.training_seconds = 0.0
        self.began = clock()

    def see(self, event: str, fields: dict[str, Any]) -> None:
        """Take one event in."""
        match event:
            case "started":
                self.steps = fields["steps"]
                self.began = self._clock()
            case "step":
                if self.first_step is None:
                    self.first_step, self.first_loss = fields["step"], fields["train_loss"]
                self.step = fields["step"]
                self.last = fields
                self.tokens += fields["tokens"]
                self.trained_tokens += fields["trained_tokens"]
                self.training_seconds += fields["step_seconds"]
            case "evaluation":
                self.evaluation = fields
                self.first_evaluation = self.first_evaluation or fields
                if _is_better(fields, self.best):
                    self.best = fields

    @property
    def elapsed(self) -> float:
        """Seconds since training began in this session."""
        return self._clock() - self.began

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step at the pace so far, evaluations and checkpoints included."""
        if self.first_step is None:
            return None
        done = self.step - self.first_step + 1
        return self.elapsed / done * (self.steps - self.step)

    @property
    def memory(self) -> int:
        """Bytes in use: the accelerator's or the largest worker's where steps say it, else this process's."""
        if "workers" in self.last:
            return max(worker["memory_bytes"] for worker in self.last["workers"])
        return self.last.get("memory_bytes") or psutil.Process().memory_info().rss

    def opening(self, fields: dict[str, Any]) -> Iterator[Line]:
        """Describe the run that starts."""
        yield Line("run", fields["tag"])
        parameters, trainable = fields["parameters"], fields["trainable_parameters"]
        of = "all trained" if trainable == parameters else f"{count(trainable)} trained ({trainable / parameters:.2%})"
        yield Line("model", f"{count(parameters)} parameters, {of}")
        yield Line("task", f"{fields['task']} on {fields['devices']}")
        yield Line("data", f"{fields['rows']:,} rows, {fields['samples']:,} samples")
        yield Line("tokens", f"{fields['tokens']:,}, of which {fields['trained_tokens']:,} trained, per epoch")
        yield Line("steps", f"{fields['steps']:,} in {number(fields['epochs'])} {plural('epoch', fields['epochs'])}")
        if fields.get("resumed_from") is not None:
            yield Line("resumed", f"from step {fields['resumed_from']:,}")

    def step_line(self) -> Line:
        """Put the last step into one line of a log."""
        width = len(f"{self.steps:,}")
        left = self.seconds_left
        parts = [
            f"{self.step:>{width},}/{self.steps:,}",
            f"loss {loss(self.last['train_loss'])}",
            f"lr {self.last['learning_rate']:.1e}",
            f"{self.last['tokens_per_second']:,.0f} tok/s",
            memory(self.memory),
        ]
        if left is not None and self.step < self.steps:
            parts.append(f"{clock_time(left)} left")
        return Line("step", "  ".join(parts))

    def evaluation_line(self, fields: dict[str, Any]) -> Line:
        """Put an evaluation into one line."""
        known = ("step", "eval_loss", "perplexity", "seconds")
        metrics = "".join(f"  {name} {number(value)}" for name, value in fields.items() if name not in known)
        best = "  best" if self.best is fields and self.first_evaluation is not fields else ""
        return Line(
            "evaluation",
            f"step {fields['step']:,}  loss {loss(fields['eval_loss'])}  perplexity {perplexity(fields['perplexity'])}"
            f"{metrics}  {duration(fields['seconds'])}{best}",
        )

    def proof_line(self, fields: dict[str, Any]) -> Line:
        """Put what was proven into one line."""
        if not fields["proven"]:
            return Line("proof", "FAILED")
        parity, mask, weights = fields["parity"], fields["mask"], fields["round_trip"]
        return Line(
            "proof",
            f"{parity['prompts']:,} prompts and {mask['turns']:,} turns served as trained, divergence on disk "
            f"{weights['reloaded']['kl']:.1g}"
            + (f", merged {weights['merged']['kl']:.1g}" if "merged" in weights else "")
            + f"  {duration(fields['seconds'])}",
        )

    def summary(self, fields: dict[str, Any]) -> Iterator[Line]:
        """Describe the finished run and what can be done with it."""
        session = f" from step {self.first_step:,}" if self.first_step not in (None, 1) else ""
        yield Line("finished", f"{self.step:,} steps{session} in {duration(self.elapsed)}")
        if self.first_loss is not None:
            yield Line("train loss", f"{loss(self.first_loss)} → {loss(self.last['train_loss'])}")
        if self.best is not None and self.first_evaluation is not None:
            first = f"{loss(self.first_evaluation['eval_loss'])} → " if self.best is not self.first_evaluation else ""
            yield Line(
                "eval loss",
                f"{first}{loss(self.best['eval_loss'])}, perplexity {perplexity(self.best['perplexity'])} "
                f"(best, step {self.best['step']:,})",
            )
        if self.training_seconds:
            yield Line(
                "tokens",
                f"{self.tokens:,}, of which {self.trained_tokens:,} trained; "
                f"{self.tokens / self.training_seconds:,.0f} tokens/s",
            )
        yield Line("artifact", str(fields["artifact_path"]))
        yield Line("next", f"llmforge chat {shlex.quote(str(fields['run_dir']))}")

    def ending(self, fields: dict[str, Any]) -> Iterator[Line]:
        """Describe where a run that failed or was interrupted stopped. The error itself is the caller's to show."""
        if not self.steps:  # it failed before training began
            return
        yield Line("stopped", f"at step {self.step:,} of {self.steps:,} after {duration(self.elapsed)}")
        if fields.get("run_dir") is not None:
            yield Line("continue", f"llmforge finetune --resume {shlex.quote(str(fields['run_dir']))}")


class PlainDisplay:
    """Lines of text without escape codes, few enough to read in a log."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._view = RunView(clock)
        self._shown_step = 0
        self._shown_at = -_LONGEST_SILENCE
        self._prepared = 0

    def event(self, event: str, **fields: Any) -> None:
        """Show one event, or leave it out where lines would come too fast."""
        if event != "step":
            self._catch_up()
        self._view.see(event, fields)
        match event:
            case "started":
                self._print(*self._view.opening(fields))
            case "step" if self._is_due():
                self._catch_up()
            case "evaluation":
                self._print(self._view.evaluation_line(fields))
            case "checkpoint":
                self._print(_checkpoint_line(fields))
            case "proof":
                self._print(self._view.proof_line(fields))
            case "finished":
                self._print(*self._view.summary(fields))
            case "failed":
                self._print(*self._view.ending(fields))

    def note(self, text: str) -> None:
        """Show one line."""
        self._print(Line("note", text))

    def progress(self, rows_done: int) -> None:
        """Show how many rows are prepared, every few seconds."""
        now = self._clock()
        if rows_done < self._prepared:  # another file began
            self._shown_at = -_LONGEST_SILENCE
        self._prepared = rows_done
        if now - self._shown_at >= _SECONDS_BETWEEN_LINES:
            self._shown_at = now
            self._print(Line("preparing", f"{rows_done:,} rows"))

    def close(self) -> None:
        """Do nothing: the stream belongs to the caller."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._catch_up()

    def _is_due(self) -> bool:
        view = self._view
        silence = self._clock() - self._shown_at
        steps_since = view.step - self._shown_step
        return (
            view.step in (view.first_step, view.steps)
            or silence >= _LONGEST_SILENCE
            or (silence >= _SECONDS_BETWEEN_LINES and steps_since * _LINES_PER_RUN >= view.steps)
        )

    def _catch_up(self) -> None:
        """Show the last step, if it has not been shown: the one before an evaluation, or before the end."""
        if self._view.step > self._shown_step:
            self._shown_step, self._shown_at = self._view.step, self._clock()
            self._print(self._view.step_line())

    def _print(self, *lines: Line) -> None:
        for line in lines:
            self._stream.write(f"{redact(str(line)).rstrip()}\n")
        self._stream.flush()


class LiveDisplay:
    """A progress bar and a small table that stay at the bottom of the terminal while everything else scrolls above."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.live import Live

        self._view = RunView(clock)
        self._rows: int | None = None
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def event(self, event: str, **fields: Any) -> None:
        """Show one event: steps in the table, everything else as a line above it."""
        self._view.see(event, fields)
        match event:
            case "started":
                self._rows = None
                self._live.start()
                self._live.refresh()
                self._print(*self._view.opening(fields))
            case "evaluation":
                self._live.refresh()
                self._print(self._view.evaluation_line(fields))
            case "checkpoint":
                self._print(_checkpoint_line(fields))
            case "proof":
                self._print(self._view.proof_line(fields))
            case "finished":
                self.close()
                self._print(*self._view.summary(fields))
            case "failed":
                self.close()
                self._print(*self._view.ending(fields))

    def note(self, text: str) -> None:
        """Show one note above the table, wrapped at words so that it stays beside its label."""
        width = max(20, self._console.width - _LABEL_WIDTH - 1)
        wrapped = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        self._print(Line("note", f"\n{'':{_LABEL_WIDTH + 1}}".join(wrapped)))

    def progress(self, rows_done: int) -> None:
        """Show how many rows are prepared."""
        self._rows = rows_done
        self._live.start(refresh=True)

    def close(self) -> None:
        """Take the table away and bring the cursor back."""
        self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _print(self, *lines: Line) -> None:
        from rich.text import Text

        for line in lines:
            label = f"{line.label:<{_LABEL_WIDTH}} "
            # Soft wrap: the terminal breaks a long path, and copying it gives the whole path.
            self._console.print(Text.assemble((label, "dim"), redact(line.text)), soft_wrap=True)

    def _render(self) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        view = self._view
        if self._rows is not None:
            return Text(str(Line("preparing", f"{self._rows:,} rows")))

        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        bar.add_column(justify="right", no_wrap=True)
        left = view.seconds_left
        bar.add_row(
            ProgressBar(total=max(view.steps, 1), completed=view.step, complete_style="cyan", finished_style="cyan"),
            f"step {view.step:,}/{view.steps:,}",
            "starting" if left is None else f"{clock_time(left)} left",
        )
        if not view.last:
            return bar

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        cells = {
            "epoch": f"{view.last['epoch']:.2f}",
            "loss": loss(view.last["train_loss"]),
            "learn. rate": f"{view.last['learning_rate']:.1e}",
            "tokens/s": f"{view.last['tokens_per_second']:,.0f}",
            "memory": memory(view.memory),
        }
        if "workers" in view.last:
            cells["tokens/s a worker"] = f"{view.last['tokens_per_second'] / len(view.last['workers']):,.0f}"
        if view.evaluation is not None and view.best is not None:
            cells["eval loss"] = loss(view.evaluation["eval_loss"])
            cells["best"] = f"{loss(view.best['eval_loss'])} @ {view.best['step']:,}"
        for name in cells:
            table.add_column(name, no_wrap=True, min_width=8)
        table.add_row(*cells.values())
        return Group("", bar, table)


def _is_better(evaluation: dict[str, Any], best: dict[str, Any] | None) -> bool:
    if best is None or not math.isfinite(best["eval_loss"]):
        return True
    return evaluation["eval_loss"] < best["eval_loss"]


def _checkpoint_line(fields: dict[str, Any]) -> Line:
    path = Path(fields["path"])
    place = f"{path.parent.name}/{path.name}"  # inside the run directory, which the summary names
    return Line("checkpoint", f"step {fields['step']:,}  {place}{'  best' if fields['best'] else ''}")


def loss(value: float | None) -> str:
    """Write a loss with four decimals, or four digits where it is large."""
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def perplexity(value: float) -> str:
    """Write a perplexity with two decimals, or three digits where it is large."""
    return f"{value:.2f}" if value < 10_000 else f"{value:.3g}"


def number(value: Any) -> str:
    """Write a metric: whole numbers whole, others with four significant digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def count(value: int) -> str:
    """Write a parameter count: 921,600 or 134.5M or 8.03B."""
    if value >= 1e9:
        return f"{value / 1e9:.2f}B"
    return f"{value / 1e6:.1f}M" if value >= 1e6 else f"{value:,}"


def memory(size: int) -> str:
    """Write a size in bytes in GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Write a duration for reading: 0.4 s, 12 s, 3 min 05 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def clock_time(seconds: float) -> str:
    """Write a duration for a table: 0:07, 3:12, 1:02:03."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def plural(word: str, amount: float) -> str:
    """Write a noun for an amount of it."""
    return word if amount == 1 else f"{word}s"


class QuietDisplay:
    """Shows notes alone, one a line: what a person should know even where a machine reads the result."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def event(self, event: str, **fields: Any) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show a note."""
        print(f"note: {redact(text)}", file=self._stream)

    def progress(self, rows_done: int) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Release nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
