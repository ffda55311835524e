"""A finished run, as Python sees it: where it lies, what it measured, and its model to talk to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmforge.bucket import bucket_url
from llmforge.errors import InputError
from llmforge.jobs.events import read_events
from llmforge.jobs.mirror import download_run
from llmforge.jobs.run_directory import RunDirectory

if TYPE_CHECKING:
    from llmforge.prompt import Message
    from llmforge.serve.engine import Engine


@dataclass
class Run:
    """A training run on disk. The model is loaded when it is first asked something.

    `url` is where it lies in a bucket, if it does; `run_dir` is its local copy then.
    """

    run_dir: Path
    tag: str
    metrics: dict[str, float] = field(default_factory=dict)
    url: str | None = None

    @property
    def artifact_dir(self) -> Path:
        """The directory of the best model."""
        return self.run_dir / "artifact"

    @cached_property
    def engine(self) -> "Engine":
        """The loaded model with its prompt format, in the number format it was trained in."""
        from llmforge.config import load_config
        from llmforge.serve.engine import Engine

        config = load_config(RunDirectory(self.run_dir).resolved_config).config
        return Engine.load(
            self.artifact_dir,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            allow_pickle_weights=config.allow_pickle_weights,
        )

    def chat(self, messages: "Sequence[Message]", **options: Any) -> str:
        """Answer a conversation; options are transformers' generation options (max_new_tokens, temperature, …)."""
        return self.engine.generate([messages], **options)[0]

    def stream(self, messages: "Sequence[Message]", **options: Any) -> Iterator[str]:
        """Answer a conversation piece by piece."""
        return self.engine.stream(messages, **options)


def load_run(run_dir: str | Path) -> Run:
    """Open a finished run; one in a bucket is downloaded to the cache, without its checkpoints.

    Raises:
        InputError: the directory is no run, or the run has not finished.
    """
    url = bucket_url(run_dir)
    directory = RunDirectory.open(local_directory(run_dir))
    if not has_finished(directory):
        place = url or directory.path
        raise InputError(
            f"{place} has not finished, so there is no model yet; continue it with llmforge finetune --resume {place}"
        )
    last = {event["event"]: event for event in read_events(directory.events)}
    return Run(directory.path, last["started"]["tag"], last["finished"]["metrics"], url)


def local_directory(place: str | Path) -> Path:
    """Give the local directory of a run or of an artifact; one in a bucket is downloaded to the cache first.

    Raises:
        InputError: there is neither in the bucket, or it cannot be read.
    """
    url = bucket_url(place)
    return Path(place) if url is None else download_run(url)


def has_finished(directory: RunDirectory) -> bool:
    """Say whether a run came to its end and its artifact is there."""
    if not directory.events.is_file() or not directory.artifact.is_dir():
        return False
    return any(event["event"] == "finished" for event in read_events(directory.events))


def find_artifact(path: str | Path) -> Path:
    """Give the artifact that a path means: an artifact directory itself, or that of a finished run.

    Raises:
        InputError: it is neither.
    """
    local = local_directory(path)
    if (local / "prompt_format.yaml").is_file():
        return local
    return load_run(path).artifact_dir


def load_engine(path: str | Path) -> "Engine":
    """Load the model of an artifact directory or of a finished run."""
    from llmforge.serve.engine import Engine

    local = local_directory(path)
    artifact = find_artifact(local)
    return Engine.load(artifact) if artifact == local else load_run(local).engine
