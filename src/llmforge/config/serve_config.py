"""Reads the files that deploy models with Ray, in each of their shapes, into what `llmforge serve` needs of them.

It must not look for models: it knows what a file says, and not whether that is there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from llmforge.config import words
from llmforge.config.section import Section
from llmforge.config.serve_schema import (
    DeploymentSection,
    Mirror,
    RayGenerationSection,
    RayllmModel,
    RayLoraSection,
    RayServeModel,
    ServeFile,
)
from llmforge.config.validate import Model, validated
from llmforge.config.yaml_source import Finding, KeyPath, Source, dotted, read_source
from llmforge.errors import ConfigError

T = TypeVar("T", bound=str | int)

# How each shape is known: by a key that it must have.
_SHAPES: dict[str, type[Section]] = {
    "applications": ServeFile,
    "engine_config": RayllmModel,
    "model_loading_config": RayServeModel,
}
_DTYPES: dict[str, Literal["fp32", "bf16"]] = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16"}
# What `llmforge serve` makes something of, in every section but `generation`, of which it reads all.
_READ = {
    *("model_id", "hf_model_id", "model_source", "bucket_uri", "tokenizer_id", "tokenizer_source", "enabled"),
    *("type", "model_type", "model_url", "model_description", "llm_engine", "input_modality", "engine_kwargs"),
    *("max_total_tokens", "max_request_context_length", "max_ongoing_requests", "max_concurrent_queries"),
    *("dynamic_lora_loading_path", "max_num_adapters_per_replica", "max_num_models_per_replica"),
}
_READ_OF_ENGINE = (
    "max_num_seqs",
    "max_model_len",
    "dtype",
    "trust_remote_code",
    "revision",
    "tokenizer",
    "chat_template",
)


@dataclass(frozen=True)
class ServedConfig:
    """One model, as a file says it is to be served. What is None is not said.

    Args:
        file: where it is said; relative paths start there.
        name: what clients call the model.
        model, tokenizer: a directory, a place in a bucket or a hub id.
        chat_template: Jinja, or a file of it.
        lora: adapters that are loaded on demand.
        max_batch: answers at a time.
        engine_kwargs: vLLM's arguments, but for those that the other fields hold.
        ray_only: keys that say something to Ray alone.
    """

    file: Path
    name: str
    model: str
    generation: RayGenerationSection
    tokenizer: str | None = None
    chat_template: str | None = None
    revision: str | None = None
    lora: RayLoraSection | None = None
    dtype: Literal["fp32", "bf16"] | None = None
    trust_remote_code: bool = False
    context_length: int | None = None
    max_batch: int | None = None
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    ray_only: tuple[str, ...] = ()


def load_serve_config(path: str | Path) -> list[ServedConfig]:
    """Read the models of a Serve application, or the one of a model config; RayLLM's shape, or Ray Serve LLM's.

    Raises:
        ConfigError: a file has none of the shapes, or something in it is wrong; says all that is.
    """
    found = list(_read(Path(path)))
    if not found:
        raise ConfigError("no model is served; name one under args, as llm_configs or models", file=str(path))
    return found


def _read(path: Path) -> Iterator[ServedConfig]:
    source = read_source(path)
    data = _without_nulls(source.data)
    shape = next((key for key in _SHAPES if key in data), None)
    match shape:
        case "applications":
            for application in _validated(source, data, ServeFile).applications:
                for inline in (*application.args.llm_configs, *_as_tuple(application.args.models)):
                    yield from _read_below(path, inline)
        case "engine_config":
            yield from _of_rayllm(path, _validated(source, data, RayllmModel))
        case "model_loading_config":
            yield _of_ray_serve(path, _validated(source, data, RayServeModel))
        case _:
            near = {key: words.nearest(key, data) for key in _SHAPES}
            meant = "".join(f"; did you mean {key} instead of {given}?" for key, given in near.items() if given)
            run = "; serve a run by its directory: llmforge serve RUN" if "train_path" in data else ""
            raise ConfigError(
                f"given a file with {words.listed(data)}; allowed is a model config, which has engine_config (RayLLM) "
                f"or model_loading_config (Ray Serve LLM), or a Serve application, which has applications{meant}{run}",
                file=source.file,
                line=1,
            )


def _read_below(path: Path, model: str | Section) -> Iterator[ServedConfig]:
    """Read what an application lists: a model config in place, a file of one, or a directory of such files."""
    if isinstance(model, RayServeModel):
        yield _of_ray_serve(path, model)
    elif isinstance(model, RayllmModel):
        yield from _of_rayllm(path, model)
    else:
        place = next((place for place in (path.parent / str(model), Path(str(model))) if place.exists()), None)
        if place is None:
            raise ConfigError(
                f"the model config {model} is not there (looked in {path.parent} and in the working directory)",
                file=str(path),
            )
        for file in sorted(place.rglob("*.yaml")) if place.is_dir() else [place]:
            yield from _read(file)


def _as_tuple(models: str | tuple[Any, ...]) -> tuple[Any, ...]:
    return (models,) if isinstance(models, str) else models


def _of_rayllm(path: Path, config: RayllmModel) -> Iterator[ServedConfig]:
    if not config.enabled:
        return
    engine, lora = config.engine_config, config.lora_config
    if lora is not None and config.multiplex_config is not None:
        bound = {"max_num_adapters_per_replica": config.multiplex_config.max_num_models_per_replica}
        lora = lora.model_copy(update=bound)
    mirror = engine.s3_mirror_config or engine.gcs_mirror_config
    model = mirror.bucket_uri if mirror else engine.hf_model_id or engine.model_id
    yield _served(
        path, config, engine.model_id, model, engine.tokenizer_id, engine.generation, lora, engine.max_total_tokens
    )


def _of_ray_serve(path: Path, config: RayServeModel) -> ServedConfig:
    loading = config.model_loading_config
    source = loading.model_source
    return _served(
        path,
        config,
        loading.model_id,
        source.bucket_uri if isinstance(source, Mirror) else source or loading.model_id,
        loading.tokenizer_source,
        config.generation_config,
        config.lora_config,
        config.max_request_context_length,
    )


def _served(
    path: Path,
    config: RayllmModel | RayServeModel,
    name: str,
    model: str,
    tokenizer: str | None,
    generation: RayGenerationSection,
    lora: RayLoraSection | None,
    context_length: int | None,
) -> ServedConfig:
    """Put together what both shapes say, with what stands in `engine_kwargs` and `deployment_config`."""
    kwargs = config.engine_config.engine_kwargs if isinstance(config, RayllmModel) else config.engine_kwargs
    deployment = config.deployment_config or DeploymentSection()
    dtype = kwargs.get("dtype")
    own = [key for key in _READ_OF_ENGINE if key != "dtype" or dtype in (*_DTYPES, "auto")]
    if kwargs.get("generation_config") == kwargs.get("tokenizer"):
        own.append("generation_config")  # which is read beside the tokenizer
    return ServedConfig(
        path,
        name,
        model,
        generation,
        tokenizer=tokenizer or _of_type(path, kwargs, "tokenizer", str),
        chat_template=_of_type(path, kwargs, "chat_template", str),
        revision=_of_type(path, kwargs, "revision", str),
        lora=lora,
        dtype=_DTYPES.get(str(dtype)),
        trust_remote_code=_of_type(path, kwargs, "trust_remote_code", bool) or False,
        context_length=context_length or _of_type(path, kwargs, "max_model_len", int),
        max_batch=_of_type(path, kwargs, "max_num_seqs", int)
        or deployment.max_ongoing_requests
        or deployment.max_concurrent_queries,
        engine_kwargs={key: value for key, value in kwargs.items() if key not in own},
        ray_only=tuple(_ray_only(config)),
    )


def _of_type(path: Path, kwargs: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    """Give an argument of the engine, if it is there. Raises ConfigError when it is nothing that vLLM takes."""
    value = kwargs.get(key)
    if value is None:
        return None
    if type(value) is not kind or (isinstance(value, int) and kind is int and value < 1):
        allowed = {str: "a text", bool: "true or false", int: "a whole number of at least 1"}[kind]
        raise ConfigError(f"engine_kwargs.{key}: given {words.shown(value)}; allowed {allowed}", file=str(path))
    return value


def _ray_only(section: Section, path: KeyPath = ()) -> Iterator[str]:
    for name in sorted(section.model_fields_set):
        value = getattr(section, name)
        if isinstance(value, RayGenerationSection):
            continue
        if isinstance(value, Section):
            yield from _ray_only(value, (*path, name))
        elif name not in _READ:
            yield dotted((*path, name))


def _validated(source: Source, data: Mapping[str, Any], model: type[Model]) -> Model:
    """Check a file against its schema. Raises ConfigError with everything that is wrong, by line."""
    config, wrongs = validated(data, model)
    findings = list(source.errors)
    for repeat in source.repeats:
        if not repeat.same_value:
            findings.append(Finding(repeat.line, f"{dotted(repeat.path)}: written twice; remove one of them"))
    for wrong in wrongs:
        around = (wrong.path[:end] for end in range(len(wrong.path), 0, -1))
        line = next((source.lines[path] for path in around if path in source.lines), 1)
        findings.append(Finding(line, f"{dotted(wrong.path)}: {wrong.text}"))
    if findings:
        findings.sort(key=lambda finding: finding.line)
        texts = [findings[0].text, *(f"{source.file}:{finding.line}: {finding.text}" for finding in findings[1:])]
        raise ConfigError("\n".join(texts), file=source.file, line=findings[0].line)
    assert config is not None
    return config


def _without_nulls(value: Any) -> Any:
    """Take out keys without a value, which count as not written."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
