"""`llmforge serve`: models of runs behind OpenAI's API, until a signal ends it."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmforge.bucket import bucket_url
from llmforge.config.serve_config import ServedConfig, load_serve_config
from llmforge.errors import ConfigError, InputError
from llmforge.jobs.mirror import holds_run
from llmforge.jobs.run import find_artifact, find_served, load_run, local_directory
from llmforge.jobs.run_directory import RunDirectory

if TYPE_CHECKING:
    from llmforge.models.source import ModelSource
    from llmforge.serve.models import Loading
    from llmforge.serve.overrides import Overrides

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    paths: Sequence[str],
    *,
    config: Path | None = None,
    engine: str = "transformers",
    adapters: Sequence[str],
    dynamic_adapters: str | None,
    max_adapters: int,
    host: str,
    port: int,
    api_keys: Sequence[str],
    max_batch: int,
    max_waiting: int,
    request_timeout: float,
    dtype: str | None,
) -> None:
    """Load models and answer requests, until SIGTERM or ctrl-C.

    Args:
        paths: runs, artifacts or plain models, each PATH or NAME=PATH.
        config: a file that deploys models with Ray; see `llmforge.config.serve_config`.
        engine: what computes the answers, transformers or vllm.
        adapters: further adapters as NAME=PATH, on a base that one of `paths` brings.
        dynamic_adapters: where adapters lie that are loaded when somebody asks for them, `max_adapters` at a time.
        dtype: instead of what the runs were trained in.

    Raises:
        InputError: a package is missing, the port is in use, or a model cannot be loaded.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise InputError(f"llmforge serve needs {', '.join(missing)}; install them with pip install 'llmforge[serve]'")
    if not all(api_keys):
        raise InputError("an API key is empty; give one with --api-key, or leave LLMFORGE_API_KEY unset")
    configured = [] if config is None else load_serve_config(config)
    if not paths and not configured:
        raise InputError("give a run, an artifact or a model to serve, or a file that names one as --config")
    dynamic_adapters, max_adapters = _dynamic_adapters(configured, dynamic_adapters, max_adapters)
    named = [_named(adapter) for adapter in adapters]
    if any(name is None for name, _ in named):
        raise InputError(f"given --adapter {' '.join(adapters)}; an adapter is given as NAME=PATH")

    from llmforge.models.arithmetic import use_one_arena
    from llmforge.models.device import DTYPES
    from llmforge.serve.app import make_app
    from llmforge.serve.door import Settings
    from llmforge.serve.models import ENGINES, Models
    from llmforge.serve.server import run_server, take_port, url_of

    chosen = None if dtype is None else next((each for each in DTYPES if each == dtype), None)
    if dtype is not None and chosen is None:
        raise InputError(f"given --dtype {dtype}; number formats are {', '.join(DTYPES)}")
    computing = next((each for each in ENGINES if each == engine), None)
    if computing is None:
        raise InputError(f"given --engine {engine}; engines are {', '.join(ENGINES)}")
    use_one_arena()
    settings = Settings(api_keys=tuple(api_keys), request_timeout=request_timeout)
    models = Models(
        dynamic_lora_loading_path=dynamic_adapters,
        max_adapters=max_adapters,
        engine=computing,
        note=lambda text: say(f"note: {text}"),
        max_batch=max_batch,
        max_waiting=max_waiting,
        prepares_grammars=True,
    )
    with take_port(host, port, stall_timeout=settings.stall_timeout) as listener, contextlib.closing(models):
        for path in paths:
            name, source, loading = _find(path)
            say(f"loading {source.name}")
            models.add(name, source, loading if chosen is None else replace(loading, dtype=chosen))
        for each in configured:
            source, loading, overrides = find_configured(each, computing)
            say(f"loading {source.name}")
            models.add(each.name, source, loading if chosen is None else replace(loading, dtype=chosen), overrides)
        for adapter, path in named:
            assert adapter is not None
            models.add_adapter(adapter, _adapter_directory(path))
        if not api_keys and host not in LOOPBACK:
            say(f"note: whoever can reach {host} may ask; --api-key keeps others out")
        names = [model.name for model in models.all()]

        def announce() -> None:
            url = f"{url_of(listener)}/v1"
            print(
                f"llmforge serves {', '.join(names)} at {url}\n  {_example(url, names[0], bool(api_keys))}", flush=True
            )

        run_server(make_app(models, settings), listener, ready=announce, say=say)


def say(text: str) -> None:
    """Tell the user something that is no result."""
    print(text, file=sys.stderr, flush=True)


def _named(given: str) -> tuple[str | None, str]:
    """Split NAME=PATH; the name is None where the whole is a path."""
    name, equals, path = given.partition("=")
    return (None, given) if not equals or not name or Path(given).exists() else (name, path)


def _find(given: str) -> "tuple[str, ModelSource, Loading]":
    """Find a model's files, its name, and how it is to be loaded: of a run, an artifact or a plain model."""
    name, path = _named(given)
    if _is_plain(path):
        from llmforge.serve.models import Loading

        place = path if bucket_url(path) else str(Path(path).resolve())
        return name or place.rstrip("/").rpartition("/")[2].removesuffix(".gguf"), _plain(path), Loading()
    local = local_directory(path)
    source, loading = find_served(path)
    if name is None:
        is_run = source.directory != local
        name = load_run(local).tag if is_run else _directory_name(local)
    return name, source, loading


def _is_plain(path: str) -> bool:
    """Say whether a path means a model that no run left: a directory, a GGUF file, a place in a bucket, a hub id."""
    url = bucket_url(path)
    if url is not None:
        return not holds_run(url)
    local = Path(path)
    if (local / "prompt_format.yaml").is_file():
        return False
    return not local.is_dir() or any((local / file).is_file() for file in ("config.json", "adapter_config.json"))


def _plain(path: str, **options: Any) -> "ModelSource":
    from llmforge.config import derive
    from llmforge.models.load import as_plain_directory
    from llmforge.models.source import ModelSource, find_model

    local = Path(path)
    if (local / "adapter_config.json").is_file():
        return ModelSource(path, local)
    source = find_model(path, key="the model", relative_to=Path.cwd(), **options)
    return as_plain_directory(source, Path(derive.cache_dir().value))


def find_configured(config: ServedConfig, engine: str) -> "tuple[ModelSource, Loading, Overrides]":
    """Find what a config file names, and say what of it stands for others than this engine."""
    from llmforge.models.source import find_model
    from llmforge.serve.models import Loading
    from llmforge.serve.overrides import Overrides

    path = _beside(config.file, config.model)
    loading = Loading()
    if _is_plain(path):
        source = _plain(path, revision=config.revision, trust_remote_code=config.trust_remote_code)
    else:
        source, loading = find_served(path)
    options: dict[str, Any] = {"max_batch": config.max_batch, "context_length": config.context_length}
    unused = list(config.ray_only)
    if engine == "vllm":
        options["engine_kwargs"] = config.engine_kwargs
    else:
        unused += [f"engine_kwargs.{key}" for key in config.engine_kwargs]
    if unused:
        say(f"note: {config.file}: {config.name}: not used here, but by Ray or vLLM: {', '.join(unused)}")
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = find_model(
            _beside(config.file, config.tokenizer), key="tokenizer", relative_to=config.file.parent, weights=False
        )
    loading = replace(
        loading,
        dtype=config.dtype or loading.dtype,
        trust_remote_code=config.trust_remote_code or loading.trust_remote_code,
        options={name: value for name, value in options.items() if value is not None},
    )
    return source, loading, Overrides.of(config, tokenizer)


def _beside(file: Path, path: str) -> str:
    """Give a path that a file names: it starts at the file, or in the working directory."""
    place = file.parent / Path(path).expanduser()
    return str(place) if place.exists() else path


def _dynamic_adapters(configured: Sequence[ServedConfig], given: str | None, most: int) -> tuple[str | None, int]:
    """Give where adapters are loaded from on demand, and how many are kept. Raises ConfigError for two places."""
    path, bound = given, most
    for config in configured:
        if config.lora is None or config.lora.dynamic_lora_loading_path is None or given is not None:
            continue
        place = _beside(config.file, config.lora.dynamic_lora_loading_path)
        if path not in (None, place):
            raise ConfigError(
                f"dynamic_lora_loading_path: given {path} and {place}; all models load adapters from one place; choose "
                "one with --dynamic-adapters",
                file=str(config.file),
            )
        path, bound = place, config.lora.max_num_adapters_per_replica
    return path, bound


def _directory_name(artifact: Path) -> str:
    """Name an artifact after its directory, or after its run where it still lies there."""
    artifact = artifact.resolve()
    is_in_run = artifact.name == "artifact" and RunDirectory(artifact.parent).events.is_file()
    return artifact.parent.name if is_in_run else artifact.name


def _adapter_directory(path: str) -> Path:
    local = local_directory(path)
    return local if (local / "adapter_config.json").is_file() else find_artifact(path)


def _example(url: str, name: str, has_key: bool) -> str:
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]}, ensure_ascii=False)
    key = " -H 'Authorization: Bearer KEY'" if has_key else ""
    return f"curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
