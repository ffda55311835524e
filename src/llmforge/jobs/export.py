"""Writes a run's model for other software to serve."""

from dataclasses import dataclass
from pathlib import Path

from llmforge.errors import InputError
from llmforge.jobs.manifest import read_manifest
from llmforge.jobs.run import find_artifact, local_directory
from llmforge.jobs.run_directory import RunDirectory, safe_name


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written where, and what its user has to know."""

    format: str
    directory: str
    files: list[str]
    notes: list[str]


def export(run: str | Path, format: str, to: Path, *, dtype: str | None = None, name: str | None = None) -> Exported:
    """Export the model of a run directory or of an artifact directory.

    Args:
        run: the run, or the artifact.
        format: one of `llmforge.export.targets.TARGETS`.
        to: the directory to write; it must not exist, or be empty.
        dtype: number format of merged weights (fp32, fp16, bf16); None keeps what they have.
        name: what servers are to call the model; None takes the run's tag.

    Raises:
        InputError: there is no such model or target, the place is taken, or the model cannot be written for it.
        RunError: a program that is needed for it failed.
    """
    from llmforge.config import derive, load_config
    from llmforge.export.targets import write_target
    from llmforge.export.targets.trained import DTYPES, Trained

    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"given --dtype {dtype}; allowed are {', '.join(DTYPES)}")
    artifact = find_artifact(run)
    run = local_directory(run)
    if to.resolve().is_relative_to(artifact.resolve()):
        raise InputError(f"{to} lies in the model that is exported, {artifact}; give a place outside it as --to")
    directory = run.resolve()
    options = {"cache_dir": Path(derive.cache_dir().value), "name": safe_name(name or directory.name)}
    parent = artifact.resolve().parent
    if RunDirectory(parent).resolved_config.is_file() and artifact.resolve() == RunDirectory(parent).artifact:
        config = load_config(RunDirectory(parent).resolved_config).config
        options |= {
            "name": safe_name(name or parent.name),
            "context_length": config.context_length,
            "context_limit": config.context_length if _is_given(parent, "context_length") else None,
            "trust_remote_code": config.trust_remote_code,
            "allow_pickle_weights": tuple(config.allow_pickle_weights),
        }
        if config.cache_dir:
            options["cache_dir"] = Path(config.cache_dir).expanduser()
    trained = Trained.open(artifact, dtype=dtype, **options)
    notes = write_target(format, trained, to.resolve())
    files = sorted(str(path.relative_to(to)) for path in to.rglob("*") if path.is_file())
    return Exported(format, str(to), files, notes)


def _is_given(run: Path, key: str) -> bool:
    """Say whether a run's user gave a value of its config; one that was derived is not theirs."""
    manifest = RunDirectory(run).manifest
    origins = read_manifest(manifest).get("origins", {}) if manifest.is_file() else {}
    return key in origins and not origins[key].startswith("derived")
