"""All models that are served: runs, artifacts, plain models, and adapters that share the weights of one base."""

import copy
import hashlib
import itertools
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakSet, WeakValueDictionary

from llmforge.bucket import BucketDirectory, bucket_url, copy_to_cache, origin_of_copy
from llmforge.config import derive
from llmforge.errors import InputError, ModelError, OutputError
from llmforge.models.adapters import NotShareableError, needs_own_base
from llmforge.models.device import DTYPES, Dtype, best_dtype, find_device
from llmforge.models.load import TOKENIZER_FILES, load_tokenizer
from llmforge.models.source import ADAPTER_CONFIG, ModelSource, check_adapter, check_weights
from llmforge.models.trained import find_base_model, is_adapter, load_trained_model
from llmforge.prompt import Encoder, StopRules, build_format, load_format
from llmforge.serve.engines.transformers import TransformersEngine
from llmforge.serve.model import ServedModel
from llmforge.serve.overrides import UNCHANGED, NoFormat, Overrides
from llmforge.serve.requests import Engine, OverloadedError

if TYPE_CHECKING:
    from llmforge.serve.engines.vllm import VllmEngine

EngineName = Literal["transformers", "vllm"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

MAX_ADAPTERS = 16
_FORMAT = "prompt_format.yaml"
_LOOK = 0.02  # seconds between two looks for an adapter that nobody uses
_LONGEST_NAME = 255  # bytes, of a file
_BUSY = 1.0  # seconds after which an adapter may be free again


class UnknownModelError(InputError):
    """There is no model of a name."""


@dataclass(frozen=True)
class Loading:
    """How a model is to be loaded.

    Args:
        dtype: number format; None takes the hardware's best.
        trust_remote_code, allow_pickle_weights: what its config allowed.
        options: of the engine, over those that all models have.
    """

    dtype: Dtype | None = None
    trust_remote_code: bool = False
    allow_pickle_weights: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Base:
    """Weights in memory and the engine over them; adapters can share those that have none in them."""

    source: ModelSource
    loading: Loading
    engine: Engine
    is_shared: bool


@dataclass(eq=False)
class _Dynamic:
    """An adapter that was loaded on demand, and those who use it."""

    model: ServedModel
    users: "WeakSet[ServedModel]" = field(default_factory=WeakSet)


class Models:
    """The models that are served, by name. All methods may be called by any thread.

    Args:
        dynamic_lora_loading_path: a directory, local or in a bucket, whose sub-directories are adapters that are loaded
            when somebody asks for them.
        engine: what computes the answers.
        max_adapters: how many of those are kept; the one that was not asked for longest makes room.
        note: is told what the user should know.
        options: of the engine.
    """

    def __init__(
        self,
        *,
        dynamic_lora_loading_path: str | None = None,
        max_adapters: int = MAX_ADAPTERS,
        engine: EngineName = "transformers",
        note: Callable[[str], None] = lambda text: None,
        **options: Any,
    ) -> None:
        self._path, self._max_adapters, self._engine = dynamic_lora_loading_path, max_adapters, engine
        self._note, self._options = note, options
        self._models: dict[str, ServedModel] = {}
        self._dynamic: OrderedDict[str, _Dynamic] = OrderedDict()  # the one asked for last at the end
        self._bases: list[_Base] = []
        # By their files, as long as a model uses them: many adapters have the same.
        self._tokenizers: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self._numbers = itertools.count()
        self._names = threading.RLock()  # held for moments
        self._loading = threading.RLock()  # held while something is loaded

    def add(
        self, name: str, source: ModelSource, loading: Loading = Loading(), overrides: Overrides = UNCHANGED
    ) -> ServedModel:
        """Serve an artifact, or a plain model with its tokenizer's own chat template.

        One without a chat template, as base models are, continues texts and is a base for adapters.

        Args:
            overrides: what is said of its prompts and answers elsewhere.

        Raises:
            ModelError: it, or its base model, is missing or damaged.
            PromptFormatError: a format or chat template cannot be used.
            InputError: the name is taken.
        """
        with self._loading:
            self._check_free(name)
            base, adapter = self._load(source, loading)
            text_source = overrides.tokenizer or (source if _has_text_side(source.directory) else base.source)
            own = self._text_side(text_source, loading)
            encoder, stop = overrides.apply(*own)
            file = text_source.directory / _FORMAT
            if file.is_file() and encoder is not own[0]:
                self._note(
                    f"{name} is not served in the prompt format that it was trained in ({file}), but in another one, "
                    "which its config gives"
                )
            defaults = {**_generation_config((overrides.tokenizer or source).directory), **overrides.defaults}
            return self._serve(name, source.directory, encoder, stop, base, adapter, defaults)

    def add_adapter(self, name: str, directory: Path) -> ServedModel:
        """Serve an adapter on a base model that is served already.

        Raises:
            ModelError: it was trained on another base, or is damaged.
            InputError: the name is taken.
        """
        with self._loading:
            self._check_free(name)
            return self._serve(name, directory, *self._adapter(directory, None))

    def put(self, model: ServedModel) -> None:
        """Serve a model over an engine that the caller has made, and closes. Raises InputError: the name is taken."""
        with self._names:
            self._check_free(model.name)
            self._models[model.name] = model

    def add_base_of(self, model: ServedModel, name: str, source: ModelSource | None = None) -> ServedModel:
        """Serve what a model was before training, in the same prompt format, to compare both.

        Args:
            source: the base model's files; None are those that an adapter names.

        Raises:
            InputError: a model of whole weights does not say what it was trained from.
        """
        with self._loading:
            self._check_free(name)
            base = self._base_of(model)
            if source is None:
                if model.adapter is None and not is_adapter(Path(model.root)):
                    raise InputError(f"{model.root} holds whole weights; its base model is not part of it")
                source = base.source
            shared = self._shared(source, base.loading)
            return self._serve(name, source.directory, model.encoder, model.stop, shared, None, model.defaults)

    def loaded(self, name: str) -> ServedModel | None:
        """Give the model of a name if it is there already; returns at once."""
        with self._names:
            return self._find(name)

    def get(self, name: str, deadline: float = 0.0) -> ServedModel:
        """Give the model of a name; adapters are loaded on demand, from where `dynamic_lora_loading_path` says.

        Args:
            deadline: until when, in `time.monotonic`'s seconds, to wait for a place while all loaded adapters answer.

        Raises:
            UnknownModelError: there is none.
            OverloadedError: all adapters that may be loaded are answering.
            InputError: an adapter cannot be loaded.
        """
        if (found := self.loaded(name)) is not None:
            return found
        base, adapter = self._split(name)
        with self._loading:
            if (found := self.loaded(name)) is not None:  # somebody else has loaded it meanwhile
                return found
            directory = None if adapter is None else self._look_up(adapter)
            if directory is None:
                raise UnknownModelError(self._unknown(name))
            while not self._makes_room():
                if time.monotonic() >= deadline:
                    raise OverloadedError(
                        f"all {self._max_adapters} adapters that may be loaded at a time are answering; try again "
                        "later",
                        _BUSY,
                    )
                time.sleep(_LOOK)
            parts = self._adapter(directory, base)
            with self._names:
                self._dynamic[name] = _Dynamic(self._serve(name, directory, *parts, is_dynamic=True))
                return self._lend(name)

    def all(self) -> list[ServedModel]:
        """Give the models that are loaded."""
        with self._names:
            return [*self._models.values(), *(dynamic.model for dynamic in self._dynamic.values())]

    @property
    def default(self) -> ServedModel | None:
        """The model of those who ask for none: the only one."""
        with self._names:
            return next(iter(self._models.values())) if len(self._models) == 1 else None

    def remove(self, name: str) -> None:
        """Serve a model no longer; requests that it answers are answered. Raises UnknownModelError."""
        with self._names:
            model = self._models.pop(name, None)
            if model is None:
                if name not in self._dynamic:
                    raise UnknownModelError(self._unknown(name))
                model = self._dynamic.pop(name).model
        if model.adapter is not None:
            model.engine.remove_adapter(model.adapter)

    def close(self) -> None:
        """Stop all engines, cancelling what is not finished."""
        with self._loading:
            for base in self._bases:
                base.engine.close()
            self._bases.clear()

    def _find(self, name: str) -> ServedModel | None:
        if name in self._models:
            return self._models[name]
        return self._lend(name) if name in self._dynamic else None

    def _lend(self, name: str) -> ServedModel:
        """Give an adapter to somebody who asked. As long as they or an answer hold it, it is not dropped."""
        self._dynamic.move_to_end(name)
        dynamic = self._dynamic[name]
        lent = copy.copy(dynamic.model)
        dynamic.users.add(lent)
        return lent

    def _makes_room(self) -> bool:
        """Drop the adapters that nobody uses and that were not asked for longest, until one more may be loaded."""
        with self._names:
            while len(self._dynamic) >= self._max_adapters:
                idle = next((name for name, dynamic in self._dynamic.items() if not dynamic.users), None)
                if idle is None:
                    return False
                self.remove(idle)
            return True

    def _unknown(self, name: str) -> str:
        names = ", ".join(model.name for model in self.all()) or "none"
        on_demand = "" if self._path is None else f", and adapters in {self._path} by the names of their directories"
        return f"there is no model {name}; served are {names}{on_demand}"

    def _check_free(self, name: str) -> None:
        with self._names:
            if name in self._models:
                raise InputError(f"two models have the name {name}; give one of them another (NAME=PATH)")

    def _serve(
        self,
        name: str,
        root: Path,
        encoder: Encoder,
        stop: StopRules,
        base: _Base,
        adapter: str | None,
        defaults: Mapping[str, Any] | None = None,
        *,
        is_dynamic: bool = False,
    ) -> ServedModel:
        model = ServedModel(
            name,
            str(root),
            int(root.stat().st_mtime),
            encoder,
            stop,
            base.engine,
            adapter,
            _generation_config(root) if defaults is None else defaults,
        )
        if not is_dynamic:
            with self._names:
                self._models[name] = model
        return model

    def _load(self, source: ModelSource, loading: Loading) -> tuple[_Base, str | None]:
        """Load what a source holds; give the engine and, where it shares one, the adapter's name in it."""
        if not is_adapter(source.directory):
            if not source.directory.is_dir():
                raise ModelError(f"there is no model at {source.name}; give a run, an artifact or a model")
            check_weights(source.directory, key="model", allow_pickle_weights=loading.allow_pickle_weights)
            return self._shared(source, loading), None
        check_adapter(source.directory, key="artifact")
        origin = find_base_model(
            source.directory,
            trust_remote_code=loading.trust_remote_code,
            allow_pickle_weights=loading.allow_pickle_weights,
        )
        why = needs_own_base(_settings(source.directory))
        if not why:
            known = len(self._bases)
            base = self._shared(origin, loading)
            try:
                return base, self._into(base, source.directory)
            except NotShareableError as error:
                why = str(error)
                if len(self._bases) > known:
                    self._bases.remove(base)
                    base.engine.close()
        if any(_is_same(base.source, origin) for base in self._bases):
            self._note(f"{source.name} gets a copy of the weights of its own ({why})")
        base = _Base(origin, loading, self._own_engine(source, loading), is_shared=False)
        self._bases.append(base)
        return base, None

    def _shared(self, source: ModelSource, loading: Loading) -> _Base:
        """Give the engine over a base model, or over whole weights; start one where there is none."""
        dtype = loading.dtype or best_dtype(find_device())[0]
        for base in self._bases:
            theirs = base.loading.dtype or best_dtype(find_device())[0]
            if base.is_shared and dtype == theirs and _is_same(base.source, source):
                return base
        engine = _engine_class(self._engine).load(
            source,
            self._tokenizer(source, loading.trust_remote_code),
            dtype=loading.dtype,
            trust_remote_code=loading.trust_remote_code,
            **{**self._options, **loading.options},
        )
        if engine.note:
            self._note(f"{source.name}: {engine.note}")
        base = _Base(source, loading, engine, is_shared=True)
        self._bases.append(base)
        return base

    def _own_engine(self, source: ModelSource, loading: Loading) -> Engine:
        """Start an engine over base and adapter together, for one whose adapter changes more than others can bear.

        Raises:
            ModelError: the engine cannot do that.
        """
        if self._engine != "transformers":
            raise ModelError(
                f"the engine {self._engine} cannot serve the adapter in {source.directory}, which changes more of its "
                "base than LoRA does; llmforge export --format merged makes a whole model of it, and --engine "
                "transformers serves it as it is"
            )
        device = find_device()
        dtype = loading.dtype or best_dtype(device)[0]
        model = load_trained_model(
            source.directory,
            dtype=DTYPES[dtype],
            trust_remote_code=loading.trust_remote_code,
            allow_pickle_weights=loading.allow_pickle_weights,
        )
        tokenizer = self._tokenizer(source, loading.trust_remote_code)
        engine = TransformersEngine(
            model, tokenizer, device=device, dtype=dtype, **{**self._options, **loading.options}
        )
        if engine.note:
            self._note(f"{source.name}: {engine.note}")
        return engine

    def _into(self, base: _Base, directory: Path) -> str:
        """Load an adapter into an engine, under a name that no adapter before it had."""
        adapter = f"{directory.name}-{next(self._numbers)}"
        base.engine.add_adapter(adapter, directory)
        return adapter

    def _adapter(self, directory: Path, asked: _Base | None) -> tuple[Encoder, StopRules, _Base, str]:
        """Load an adapter into the engine over the base that it was trained on.

        Args:
            asked: the base that the request names.
        """
        check_adapter(directory, key="adapter")
        shared = [base for base in self._bases if base.is_shared]
        base = next((base for base in shared if _was_trained_on(directory, base.source)), None)
        if base is None or (asked is not None and base is not asked):
            served = asked.source.name if asked else ", ".join(base.source.name for base in shared) or "none"
            raise ModelError(
                f"the adapter in {directory} was trained on {_base_name(directory)}, and the base models that are "
                f"served are: {served}. Serve its base model, too; if they are the same model, write the path of the "
                f"one that is served as base_model_name_or_path in {ADAPTER_CONFIG}"
            )
        if (directory / _FORMAT).is_file():
            encoder, stop = self._text_side(ModelSource(str(directory), directory), base.loading)
        else:
            of = next((model for model in self.all() if model.engine is base.engine), None)
            encoder, stop = self._text_side(base.source, base.loading) if of is None else (of.encoder, of.stop)
            self._note(
                f"the adapter in {directory} brings no {_FORMAT}; it is served in the prompt format of "
                f"{base.source.name if of is None else of.name}"
            )
        return encoder, stop, base, self._into(base, directory)

    def _text_side(self, source: ModelSource, loading: Loading) -> tuple[Encoder, StopRules]:
        tokenizer = self._tokenizer(source, loading.trust_remote_code)
        if (source.directory / _FORMAT).is_file():
            return load_format(source.directory, tokenizer)
        format = build_format(None, tokenizer) if tokenizer.chat_template else NoFormat()
        encoder = Encoder(tokenizer, format)
        ends = _generation_config(source.directory).get("eos_token_id") or []
        return encoder, StopRules.derive(encoder, [], ends if isinstance(ends, list) else [ends])

    def _tokenizer(self, source: ModelSource, trust_remote_code: bool) -> Any:
        digest = hashlib.blake2b()
        names = {*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "chat_template*", "config.json"}
        for path in sorted({path for name in names for path in source.directory.glob(name) if path.is_file()}):
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
        key = digest.hexdigest()
        tokenizer = self._tokenizers.get(key)
        if tokenizer is None:
            tokenizer = self._tokenizers[key] = load_tokenizer(source, trust_remote_code=trust_remote_code)
        return tokenizer

    def _base_of(self, model: ServedModel) -> _Base:
        return next(base for base in self._bases if base.engine is model.engine)

    def _split(self, name: str) -> tuple[_Base | None, str | None]:
        """Read ADAPTER or BASE:ADAPTER; the adapter is None where none is looked for."""
        if self._path is None:
            return None, None
        with self._names:
            models = {base.source.name: base for base in self._bases if base.is_shared}
            models |= {model.name: self._base_of(model) for model in self._models.values()}
        for served, base in sorted(models.items(), key=lambda item: len(item[0]), reverse=True):
            if name.startswith(f"{served}:"):
                return base, name[len(served) + 1 :]
        return None, name

    def _look_up(self, adapter: str) -> Path | None:
        """Find an adapter, or the run of one, in `dynamic_lora_loading_path`; None where there is none.

        A name that could lead out of it is none.
        """
        assert self._path is not None
        if not adapter or adapter.startswith(".") or any(c in adapter for c in "/\\\0") or not adapter.isprintable():
            return None
        if len(adapter.encode()) > _LONGEST_NAME:
            return None
        url = bucket_url(self._path)
        if url is None:
            return _artifact_in(Path(self._path).expanduser() / adapter)
        return _artifact_in(_download(BucketDirectory(f"{url}/{adapter}")))


def _engine_class(name: EngineName) -> "type[TransformersEngine] | type[VllmEngine]":
    if name == "transformers":
        return TransformersEngine
    from llmforge.serve.engines.vllm import VllmEngine

    return VllmEngine


def _artifact_in(directory: Path | None) -> Path | None:
    if directory is None:
        return None
    return next((place for place in (directory, directory / "artifact") if is_adapter(place)), None)


def _download(directory: BucketDirectory) -> Path | None:
    """Copy an adapter, or the artifact of a run, from a bucket to the cache."""
    entries = directory.entries()
    beside = [name for name in entries if "/" not in name]
    wanted = [name for name in entries if name.startswith("artifact/")] if ADAPTER_CONFIG not in beside else beside
    if not wanted:
        return None
    cache_dir = Path(derive.cache_dir().value)
    try:
        return copy_to_cache(directory, {name: entries[name] for name in wanted}, wanted, cache_dir)
    except OSError as error:
        raise OutputError(
            f"{directory.url} cannot be stored in the cache {cache_dir} ({error.strerror or type(error).__name__}); "
            "free some space there, or set XDG_CACHE_HOME to another place"
        ) from error


def _has_text_side(directory: Path) -> bool:
    return (directory / _FORMAT).is_file() or not is_adapter(directory)


def _settings(directory: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return settings


def _base_name(directory: Path) -> str:
    settings = _settings(directory)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not name:
        return "a base model that it does not name"
    return f"{name} at {revision}" if revision else name


def _is_same(one: ModelSource, other: ModelSource) -> bool:
    return one.directory.resolve() == other.directory.resolve()


def _was_trained_on(adapter: Path, base: ModelSource) -> bool:
    """Say whether an adapter names a base model: by its place, by its name, or as files with the same content.

    No other model is downloaded to find out.
    """
    name = str(_settings(adapter).get("base_model_name_or_path"))
    for directory in (adapter, Path.cwd()):
        place = (directory / Path(name).expanduser()).resolve()
        if place == base.path.resolve():
            return True
        if place.is_dir():
            return place == base.directory.resolve() or ModelSource(name, place).content_hash() == base.content_hash()
    if (origin := origin_of_copy(Path(name))) is not None:
        return origin == origin_of_copy(base.directory)
    return name == base.name and _is_same(find_base_model(adapter), base)  # which may be another revision


def _generation_config(directory: Path) -> dict[str, Any]:
    """Read what an artifact's or a model's `generation_config.json` sets."""
    try:
        content = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in content.items() if value is not None} if isinstance(content, dict) else {}
