"""The life of a run in this process: prepares it, gives it a directory, trains, and records how it went."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmforge.atomic import write_atomically
from llmforge.bucket import bucket_url
from llmforge.config import LoadedConfig, load_config, refuse_unavailable
from llmforge.errors import ConfigError
from llmforge.jobs.cluster import Placement, placed, train_on_ray
from llmforge.jobs.events import EventLog, Reporters, read_events, redact
from llmforge.jobs.interruptions import remember_interrupts
from llmforge.jobs.loggers import check_logger, make_logger
from llmforge.jobs.manifest import build_manifest, read_manifest, write_manifest
from llmforge.jobs.mirror import Mirror
from llmforge.jobs.run import Run, has_finished, load_run
from llmforge.jobs.run_directory import RunDirectory
from llmforge.jobs.stragglers import Stragglers
from llmforge.models.source import ModelSource
from llmforge.train.reporter import Reporter, Unheard

if TYPE_CHECKING:
    from llmforge.data.executors import Executor
    from llmforge.train.prepare import Preparation
    from llmforge.train.run import Result

LOSS_CURVE = "loss_curve.png"

Interrupting = AbstractContextManager[Callable[[], bool]]
"""In it, an interrupt is remembered instead of raised; it gives the question whether one came."""

Importing = Callable[[], AbstractContextManager[None]]
"""Makes a context in which torch and all that builds on it are imported."""


class Audience(Reporter, Protocol):
    """A reporter that a person watches; it also hears how far the preparation is."""

    def progress(self, rows_done: int) -> None:
        """Take in how many rows have been prepared."""


def finetune(
    loaded: LoadedConfig,
    audience: Audience,
    *,
    dry_run: bool = False,
    allow_unproven: bool = False,
    wait: bool = False,
    importing: Importing = nullcontext,
    executor: "Executor | None" = None,
) -> Run | None:
    """Run the fine-tuning job that a config describes; with `dry_run` stop before the first step and leave nothing.

    With `allow_unproven` the artifact is published even where it is not proven to serve what was trained. With `wait`
    a cluster that grows by itself is waited for. `importing` is how a program of its own imports torch sooner than a
    library may; `executor` encodes the rows, by default on this machine.

    Raises:
        InputError: something given is wrong; nothing was trained.
        RunError: the run failed; what it had done is in its directory.
    """
    refuse_unavailable(loaded)
    # Before rows are encoded, which can take an hour: is there a place to write to, and one to run?
    if bucket_url(loaded.config.output_dir):
        Mirror.check(loaded.config)
    else:
        RunDirectory.check(Path(loaded.config.output_dir).expanduser(), loaded.config.custom_model_tag)
    _check_logger(loaded)
    with placed(loaded, None, wait=wait, note=audience.note) as placement:
        preparation = _prepare(loaded, audience, allow_unproven, importing, executor)
        from llmforge.train.run import check_model

        needed = check_model(preparation)
        output = preparation.config.output
        mirror = Mirror.of(output.output_dir, output.tag, Path(preparation.config.data.cache_dir))
        parent = Path(output.output_dir) if mirror is None else mirror.directory.parent
        if dry_run:
            return _train(RunDirectory.at(parent, output.tag), preparation, audience, None, dry_run=True)
        if mirror is not None:
            mirror.claim()
        directory = RunDirectory.create(parent, output.tag)
        with directory.lock():
            RunDirectory.check(parent, output.tag)  # again: another process may have had it in between
            directory.require_free_space(needed, key="output_dir" if mirror is None else "cache_dir")
            write_atomically(directory.config, loaded.text)
            preparation.train.dataset.ledger.write(directory.rows)
            write_manifest(directory.manifest, _manifest(loaded, preparation))
            # The last: with it a run can be resumed.
            write_atomically(directory.resolved_config, redact(preparation.config.to_yaml()))
            return _train(directory, preparation, audience, placement, mirror=mirror, allow_unproven=allow_unproven)


def resume(
    run_dir: str | Path,
    audience: Audience,
    *,
    allow_unproven: bool = False,
    workers: int | None = None,
    wait: bool = False,
    importing: Importing = nullcontext,
    executor: "Executor | None" = None,
) -> Run:
    """Continue a run from its last checkpoint that is whole; its result is that of a run which never stopped.

    On another number of `workers` every step has the same examples as before; only rounding differs. A run that has
    finished is given back as it is. If its artifact is gone, it is written again. `run_dir` may be in a bucket; then
    what is missing here is downloaded first.

    Raises:
        InputError: the directory holds no run or another process trains it, or its data or model have changed since.
        RunError: the run failed again.
    """
    mirror = Mirror.to_resume(run_dir, audience.note)
    directory = RunDirectory.open(Path(run_dir) if mirror is None else mirror.directory)
    with directory.lock():
        return _resume(directory, mirror, audience, allow_unproven, workers, wait, importing, executor)


def _resume(
    directory: RunDirectory,
    mirror: Mirror | None,
    audience: Audience,
    allow_unproven: bool,
    workers: int | None,
    wait: bool,
    importing: Importing,
    executor: "Executor | None",
) -> Run:
    if not directory.resolved_config.is_file():
        raise ConfigError(
            f"{directory.path} was stopped while it was being prepared and holds nothing to continue; delete it and "
            "start the run again from its YAML file"
        )
    if has_finished(directory):
        if mirror is not None:
            mirror.finish()
        audience.note(f"{directory.path} has finished already; there is nothing to continue")
        return replace(load_run(directory.path), url=None if mirror is None else mirror.url)
    overrides = () if mirror is None else (f"cache_dir={json.dumps(str(mirror.cache_dir))}",)
    loaded = load_config(directory.resolved_config, overrides)
    _check_logger(loaded)
    with placed(loaded, workers, wait=wait, note=audience.note) as placement:
        preparation = _prepare(loaded, audience, allow_unproven, importing, executor)
        _refuse_changes(read_manifest(directory.manifest), _manifest(loaded, preparation), directory)
        run = _train(
            directory,
            preparation,
            audience,
            placement,
            mirror=mirror,
            resuming=True,
            overrides=overrides,
            allow_unproven=allow_unproven,
        )
    assert run is not None
    return run


def _check_logger(loaded: LoadedConfig) -> None:
    if loaded.config.logger is not None:
        check_logger(loaded.config.logger.provider, loaded.config.logger.provider_config)


def _prepare(
    loaded: LoadedConfig,
    audience: Audience,
    allow_unproven: bool,
    importing: Importing,
    executor: "Executor | None",
) -> "Preparation":
    for note in loaded.notes:
        audience.note(note)
    with importing():  # torch and transformers come here, and not with the commands
        import llmforge.train.run  # noqa: F401 - which is needed next
        from llmforge.train.prepare import prepare_run
    return prepare_run(loaded, audience, audience.progress, allow_unproven=allow_unproven, executor=executor)


def _train(
    directory: RunDirectory,
    preparation: "Preparation",
    audience: Audience,
    placement: Placement | None,
    *,
    mirror: Mirror | None = None,
    resuming: bool = False,
    overrides: Sequence[str] = (),
    dry_run: bool = False,
    allow_unproven: bool = False,
) -> Run | None:
    if dry_run:
        from llmforge.train.run import run

        reporter = Reporters([audience])
        run(
            preparation,
            checkpoints=directory.checkpoints,
            artifact=directory.artifact,
            reporter=reporter,
            interruptions=partial(remember_interrupts, reporter.note),
            add_documents=lambda path, result: None,
            dry_run=True,
        )
        return None

    audiences: list[Reporter] = [audience]
    if mirror is not None:
        audiences.append(mirror)  # behind the events, which it uploads
        mirror.tell = audience.note
        mirror.try_upload()
    place = str(directory.path) if mirror is None else mirror.url
    devices = preparation.config.devices
    try:
        if placement is not None:
            train_on_ray(
                directory,
                placement,
                Reporters(audiences),
                place=place,
                overrides=overrides,
                max_failures=devices.max_failures,
                timeout=devices.worker_timeout,
                allow_unproven=allow_unproven,
            )
            metrics = load_run(directory.path).metrics
        else:
            metrics = _train_here(
                directory,
                preparation,
                audiences,
                interruptions=remember_interrupts,
                place=place,
                resuming=resuming,
                allow_unproven=allow_unproven,
            )
    except BaseException:
        if mirror is not None:
            mirror.stop()
        raise
    if mirror is not None:
        mirror.finish()
    return Run(directory.path, preparation.config.output.tag, metrics, None if mirror is None else mirror.url)


def train_as_worker(
    run_dir: Path,
    *,
    rank: int,
    place: str,
    overrides: Sequence[str],
    allow_unproven: bool,
    interruptions: Callable[[Path], Interrupting],
) -> None:
    """Train a run that another process has prepared, as one of several workers.

    Args:
        place: where a person finds the run.
        overrides: what is set otherwise than in the run's resolved config, as where it goes on in another place.

    Raises:
        InputError, RunError: as `finetune`.
    """
    from llmforge.train.prepare import prepare_run
    from llmforge.train.run import run

    directory = RunDirectory.open(run_dir)
    loaded = load_config(directory.resolved_config, overrides)
    preparation = prepare_run(loaded, Unheard(), allow_unproven=allow_unproven)
    if rank == 0:
        _train_here(
            directory,
            preparation,
            [],
            interruptions=lambda note: interruptions(run_dir),
            place=place,
            resuming=True,
            allow_unproven=allow_unproven,
        )
        return
    run(
        preparation,
        checkpoints=directory.checkpoints,
        artifact=directory.artifact,
        reporter=Unheard(),
        interruptions=lambda: interruptions(run_dir),
        add_documents=lambda path, result: None,
        resuming=True,
        allow_unproven=allow_unproven,
    )


def _train_here(
    directory: RunDirectory,
    preparation: "Preparation",
    audiences: Sequence[Reporter],
    *,
    interruptions: Callable[[Callable[[str], None]], Interrupting],
    place: str,
    resuming: bool,
    allow_unproven: bool,
) -> dict[str, float]:
    """Train in this process, and record how it goes; return the best checkpoint's metrics.

    Args:
        place: where a person finds the run.
    """
    from llmforge.train.run import run

    config = preparation.config
    with EventLog(directory.events) as events:
        loggers: list[Reporter] = []
        if config.logger is not None:
            loggers.append(
                make_logger(
                    config.logger.provider,
                    config.logger.provider_config,
                    tag=config.output.tag,
                    model_id=config.model.model_id,
                    resolved=config.values,
                    run_dir=directory.path,
                )
            )
        heard = Reporters([events, *audiences], loggers)
        reporter = Reporters([heard, Stragglers(heard.note)])
        try:
            result = run(
                preparation,
                checkpoints=directory.checkpoints,
                artifact=directory.artifact,
                reporter=reporter,
                interruptions=partial(interruptions, reporter.note),
                add_documents=partial(_add_documents, directory, preparation),
                resuming=resuming,
                allow_unproven=allow_unproven,
            )
        except BaseException as error:
            reporter.event("failed", error=redact(str(error) or type(error).__name__), run_dir=place)
            raise
        assert result is not None
        reporter.event(
            "finished",
            best_step=result.best_step,
            metrics=result.metrics,
            artifact_path=f"{place}/{directory.artifact.name}",
            run_dir=place,
            proven=result.proof.proven,
        )
    return result.metrics


def _manifest(loaded: LoadedConfig, preparation: "Preparation") -> dict[str, Any]:
    def split(name: str) -> dict[str, Any]:
        found = preparation.train if name == "train" else preparation.valid
        if found is None:
            return {}
        ledger = found.dataset.ledger
        return {
            name: {
                "hash": found.prepared.content_hash,
                "rows": ledger.rows,
                **ledger.counts,
                "samples": len(found.dataset),
                "tokens": int(found.dataset.lengths.sum()),
                "trained_tokens": int(found.dataset.trained_tokens.sum()),
                "tokens_lost": ledger.tokens_lost,
                "trained_tokens_lost": ledger.trained_tokens_lost,
            }
        }

    source, adapter = preparation.weights_source, preparation.adapter
    return build_manifest(
        config_hash=_hash(preparation.config.to_yaml()),
        data={**split("train"), **split("valid")},
        base_model={"name": source.name, "hash": source.content_hash()},
        tokenizer_hash=preparation.encoder.tokenizer_fingerprint(),
        prompt_format_hash=preparation.encoder.format_fingerprint(),
        more={
            "initial_adapter": {"hash": None if adapter is None else ModelSource(adapter.name, adapter).content_hash()},
            "device": preparation.device.type,
            "origins": {key: str(origin) for key, origin in preparation.config.origins.items()},
        },
    )


def _refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], directory: RunDirectory) -> None:
    """Refuse to continue with other data, weights, tokenizer or format: the result would be neither run's."""
    changed = []
    for name in ("train", "valid"):
        if before["data"].get(name, {}).get("hash") != now["data"].get(name, {}).get("hash"):
            changed.append(f"the rows of {name}_path")
    changed += [
        words
        for key, words in (
            ("base_model", "the base model"),
            ("initial_adapter", "the adapter to continue"),
            ("tokenizer", "the tokenizer"),
            ("prompt_format", "the prompt format"),
        )
        if before[key]["hash"] != now[key]["hash"]
    ]
    if changed:
        raise ConfigError(
            f"{directory.path} cannot be continued: {', '.join(changed)} changed since it started. Restore what it "
            f"was, or start a new run with llmforge finetune {directory.config}"
        )


def _add_documents(directory: RunDirectory, preparation: "Preparation", artifact: Path, result: "Result") -> None:
    """Write the loss curve and the model card into the artifact."""
    from llmforge.export.card import CardFacts, Evaluation, model_card
    from llmforge.export.loss_curve import plot_losses
    from llmforge.export.proof_words import proof_lines

    events = read_events(directory.events)
    # A resumed run goes over some steps again; the last record of a step is the one that counts.
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    evaluations = {event["step"]: event for event in events if event["event"] == "evaluation"}
    train_losses = [(step, event["train_loss"]) for step, event in sorted(steps.items())]
    tag = preparation.config.output.tag
    plot_losses(
        train_losses,
        [(step, event["eval_loss"]) for step, event in sorted(evaluations.items())],
        artifact / LOSS_CURVE,
        tag,
    )
    config, source = preparation.config, preparation.weights_source
    manifest = read_manifest(directory.manifest)
    data = preparation.train.dataset
    facts = CardFacts(
        tag=tag,
        base_model=result.base_model,
        hub_id=None if source.is_local else source.name,
        is_adapter=config.adapter is not None,
        task=config.task.name,
        parameters=result.parameters,
        trainable_parameters=result.trainable_parameters,
        rows=preparation.train.prepared.statistics.rows,
        samples=len(data),
        tokens_per_epoch=int(data.lengths.sum()),
        trained_tokens_per_epoch=int(data.trained_tokens.sum()),
        epochs=config.optimization.num_epochs,
        steps=preparation.total_steps,
        best_step=result.best_step,
        first_train_loss=train_losses[0][1],
        last_train_loss=train_losses[-1][1],
        evaluations=[
            Evaluation(step, event["eval_loss"], event["perplexity"]) for step, event in sorted(evaluations.items())
        ],
        prompt_format_yaml=(artifact / "prompt_format.yaml").read_text(encoding="utf-8"),
        rendered_example=preparation.encoder.rendered_example(),
        stopping_sequences=preparation.stop.sequences,
        resolved_config_yaml=config.to_yaml(),
        hashes={
            "training data": manifest["data"]["train"]["hash"],
            "base model": manifest["base_model"]["hash"],
            "tokenizer": manifest["tokenizer"]["hash"],
            "prompt format": manifest["prompt_format"]["hash"],
        },
        versions=manifest["versions"],
        proof=proof_lines(result.proof),
        loss_curve=LOSS_CURVE,
        embedding_rows=preparation.embedding_rows,
    )
    write_atomically(artifact / "README.md", redact(model_card(facts)))  # it is what people publish


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
