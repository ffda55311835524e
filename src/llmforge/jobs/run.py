"""A finished run, as Python sees it: where it lies, what it measured, and its model to talk to."""

import weakref
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
    from llmforge.config.schema import FineTuningConfig
    from llmforge.models.source import ModelSource
    from llmforge.prompt import Message
    from llmforge.serve.model import ServedModel
    from llmforge.serve.models import Loading, Models

TUNED, BASE = "tuned", "base"
_AT_ONCE = 8  # conversations that are answered together


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

    @property
    def model(self) -> "ServedModel":
        """The model with its prompt format, in the number format it was trained in; loaded when it is first used."""
        return self._loaded[1]

    @cached_property
    def base(self) -> "ServedModel":
        """What the model was before training, asked in the same prompt format."""
        return load_base(*self._loaded, self.run_dir)

    def chat(self, messages: "Sequence[Message]", **options: Any) -> str:
        """Answer a conversation; options are those of transformers' `generate`: max_new_tokens, temperature, top_p,
        top_k, min_p, do_sample, repetition_penalty, seed.
        """
        return "".join(self.stream(messages, **options))

    def stream(self, messages: "Sequence[Message]", **options: Any) -> Iterator[str]:
        """Answer a conversation piece by piece."""
        from llmforge.serve.offline import stream

        return stream(self.model, messages, options)

    def generate(
        self, conversations: "Sequence[Sequence[Message]]", *, base: bool = False, **options: Any
    ) -> list[str]:
        """Answer conversations, several at a time.

        Args:
            base: ask the base model.
        """
        from llmforge.serve.offline import answer_all

        model = self.base if base else self.model
        prompts = [model.encode(messages) for messages in conversations]
        answers = dict(answer_all(model, prompts, options, at_once=_AT_ONCE))
        return [answers[place] for place in range(len(prompts))]

    @cached_property
    def _loaded(self) -> "tuple[Models, ServedModel]":
        models, model = load_model(self.run_dir)
        weakref.finalize(self, models.close)
        return models, model


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


def load_model(path: str | Path, **options: Any) -> "tuple[Models, ServedModel]":
    """Load the model of an artifact directory or of a finished run.

    Args:
        options: of `Models`.
    """
    from llmforge.serve.models import Models

    models = Models(**options)
    return models, models.add(TUNED, *find_served(path))


def load_base(models: "Models", model: "ServedModel", path: str | Path) -> "ServedModel":
    """Load what a run's or an artifact's model was before training, to be asked in the same prompt format.

    Raises:
        InputError: an artifact of whole weights without its run does not say what it was trained from.
    """
    local = local_directory(path)
    return models.add_base_of(model, BASE, None if find_artifact(local) == local else _base_source(local))


def find_served(path: str | Path) -> "tuple[ModelSource, Loading]":
    """Give the artifact that a path means, and how its run's config says that it is to be loaded.

    Raises:
        InputError: it is neither an artifact nor a finished run.
    """
    from llmforge.models.source import ModelSource
    from llmforge.serve.models import Loading

    local = local_directory(path)
    artifact = find_artifact(local)
    source = ModelSource(str(artifact), artifact)
    return (source, Loading()) if artifact == local else (source, _loading(_config(local)))


def _base_source(run_dir: Path) -> "ModelSource | None":
    """Find the base model of a run that trained all weights; an adapter names its own."""
    from llmforge.config import derive
    from llmforge.config.section import RepoId
    from llmforge.models.load import as_plain_directory
    from llmforge.models.source import find_model

    config = _config(run_dir)
    if config.lora_config is not None:
        return None
    given = config.initial_base_model_ckpt_path or config.model_id
    cache_dir = Path(config.cache_dir or derive.cache_dir().value).expanduser().resolve()
    source = find_model(
        given.repo_id if isinstance(given, RepoId) else given,
        relative_to=run_dir,
        revision=config.revision if given == config.model_id else None,
        allow_pickle_weights=config.allow_pickle_weights,
        trust_remote_code=config.trust_remote_code,
        cache_dir=cache_dir,
    )
    return as_plain_directory(source, cache_dir)


def _config(run_dir: Path) -> "FineTuningConfig":
    from llmforge.config import load_config

    return load_config(RunDirectory(run_dir).resolved_config).config


def _loading(config: "FineTuningConfig") -> "Loading":
    from llmforge.serve.models import Loading

    return Loading(config.dtype, config.trust_remote_code, tuple(config.allow_pickle_weights))
