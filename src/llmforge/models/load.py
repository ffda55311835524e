"""Loads tokenizers, configs and base models through transformers, and prepares a model for training on one device."""

import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from llmforge.atomic import atomic_directory, write_atomically
from llmforge.errors import ModelError
from llmforge.models.source import ModelSource

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
# What transformers raises for files that are missing, damaged or not what it expects.
UNREADABLE = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs to know of a model, read from its config.

    `native_context_length` is None for models without a position limit.
    """

    architecture: str
    native_context_length: int | None
    hidden_size: int
    num_layers: int
    vocab_size: int


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that belongs to a model.

    Raises:
        ModelError: there is none, or transformers cannot read it.
    """
    if source.gguf_file is None and not any(any(source.directory.glob(name)) for name in TOKENIZER_FILES):
        raise ModelError(
            f"{source.name} has no tokenizer; expected tokenizer.json or tokenizer.model in {source.directory}. Copy "
            "the tokenizer's files there (tokenizer.save_pretrained writes them)"
        )
    with quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(
                source.directory,
                trust_remote_code=trust_remote_code,
                # Else, where mistral-common is installed (vLLM brings it), a class that knows no chat templates and
                # takes special tokens for plain text.
                mistral_format=False,
                **source.load_options,
            )
        except UNREADABLE as error:
            if not trust_remote_code:
                _refuse_code(source, "tokenizer_config.json")
            raise ModelError(
                f"the tokenizer of {source.name} cannot be read ({reason(error)}); copy or download its files again"
            ) from error


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Save a tokenizer so that it is the same when it is loaded again.

    Llama's saves no `legacy`, and takes the opposite value when it is loaded without: text behind a special token then
    loses the space that SentencePiece put there (https://github.com/huggingface/transformers/pull/24565), and the
    model is fed ids it was not trained on.
    """
    with quiet():
        tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    legacy = getattr(tokenizer, "legacy", None)
    if legacy is not None and settings.get("legacy") != legacy:
        write_atomically(path, json.dumps({**settings, "legacy": legacy}, indent=2, ensure_ascii=False) + "\n")


def _read_config(source: ModelSource, trust_remote_code: bool) -> Any:
    with quiet():
        try:
            return transformers.AutoConfig.from_pretrained(source.directory, trust_remote_code=trust_remote_code)
        except UNREADABLE as error:
            if not trust_remote_code:
                _refuse_code(source, "config.json")
            model_type = _read_json(source.directory / "config.json").get("model_type")
            if model_type is None:
                raise ModelError(
                    f"{source.directory / 'config.json'} has no model_type, so nobody knows which architecture it is; "
                    "copy or download the model again"
                ) from error
            if model_type not in transformers.CONFIG_MAPPING:
                raise ModelError(
                    f"{source.name} is of type {model_type}, which transformers {transformers.__version__} does not "
                    "know; upgrade transformers, or give another model"
                ) from error
            raise ModelError(
                f"{source.directory / 'config.json'} is not that of a {model_type} model ({reason(error)}); copy or "
                "download it again"
            ) from error


def _refuse_code(source: ModelSource, settings: str) -> None:
    """Raise ModelError if a settings file names Python code of the repository's own."""
    auto_map = _read_json(source.directory / settings).get("auto_map")
    if auto_map:
        raise ModelError(
            f"{source.name} brings Python code of its own ({settings} names it under auto_map), which would run on "
            "this machine. Read it, and if you trust it, set trust_remote_code: true"
        )


def _read_json(path: Path) -> dict[str, Any]:
    """Read a settings file; one that cannot be read is as good as absent, since transformers has refused it already."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def native_context_length(config: Any) -> int | None:
    """Give the most tokens that a model was made for by its config; None where there is no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None  # XLNet says -1


def read_facts(source: ModelSource, *, trust_remote_code: bool = False) -> ModelFacts:
    """Read a model's config, no weights.

    Raises:
        ModelError: the config is missing, unreadable, or not that of a causal language model.
    """
    config = _read_config(source, trust_remote_code)
    text = config.get_text_config()
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not config.to_dict().get("auto_map"):
        raise ModelError(
            f"{source.name} is of type {config.model_type}, which is not a causal language model that transformers "
            f"{transformers.__version__} knows; give a model that continues text"
        )
    return ModelFacts(
        architecture=config.model_type,
        native_context_length=native_context_length(config),
        hidden_size=getattr(text, "hidden_size", 0),
        num_layers=getattr(text, "num_hidden_layers", 0),
        vocab_size=getattr(text, "vocab_size", 0),
    )


def as_plain_directory(source: ModelSource, cache_dir: Path) -> ModelSource:
    """Convert a GGUF model, once, to a plain directory with dequantised fp32 weights; other sources stay as they are.

    An adapter names its base model, and nothing but a plain directory is loaded as a base by transformers and PEFT
    without further arguments.
    """
    if source.gguf_file is None:
        return source
    directory = cache_dir / "gguf" / source.content_hash()
    if not directory.is_dir():
        with quiet(), atomic_directory(directory) as temporary:
            try:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    source.directory,
                    gguf_file=source.gguf_file,
                    quantization_config=transformers.GgufConfig(dequantize=True),
                    dtype=torch.float32,
                )
            except UNREADABLE as error:
                raise ModelError(
                    f"{source.name} cannot be read as GGUF ({reason(error)}); download it again, or give the model as "
                    "a directory"
                ) from error
            model.save_pretrained(temporary)
            save_tokenizer(load_tokenizer(source), temporary)
    return ModelSource(source.name, directory, converted_from=source.path)


def load_base_model(
    source: ModelSource,
    *,
    dtype: torch.dtype | Literal["auto"],
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a causal language model with every weight from its files.

    Args:
        source: a plain directory (see `as_plain_directory`).
        dtype: of the weights in memory; "auto" is that of the files.
        attention: transformers' name of an attention implementation; None lets transformers choose.

    Raises:
        ModelError: files that cannot be read, do not fit the architecture, or leave weights unset.
    """
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    with quiet():
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                source.directory,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=None if source.pickles else True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # only to say below which they are
                **options,
            )
        except torch.OutOfMemoryError:
            raise
        except UNREADABLE as error:
            raise ModelError(f"the weights of {source.name} cannot be loaded: {reason(error)}") from error
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        raise ModelError(
            f"{len(mismatched)} tensors of {source.name} do not fit its config.json, {name} for one: its weights have "
            f"the shape {list(found)}, config.json asks for {list(expected)}. Check that they belong together"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights of {source.name} lack {len(missing)} tensors of its architecture "
            f"({', '.join(missing[:5])}); training would start from random numbers there. Check that config.json and "
            "weights belong together"
        )
    return model


def build_skeleton(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Build a model without weights (on torch's meta device), to see its modules and count its parameters."""
    config = _read_config(source, trust_remote_code)
    with quiet(), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def takes_logits_to_keep(model: Any) -> bool:
    """Say whether a model's forward can compute the logits of the last positions only."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def enable_activation_checkpointing(model: Any) -> str | None:
    """Recompute activations in the backward pass instead of keeping them; return why not, where a model cannot."""
    try:
        with quiet():
            model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        return f"activation checkpointing is off: {reason(error)}"
    return None


def compile_layers(model: torch.nn.Module, options: Mapping[str, Any]) -> None:
    """Compile a model's layers, one graph for all of them, at their first call; the whole model where it has no list.

    Args:
        options: of `torch.compile`. Unless it says otherwise lengths are taken as changing, else each is compiled anew.
    """
    layers = layers_of(model) or [model]
    dynamic = True if options.get("dynamic") is None else options["dynamic"]
    for layer in layers:
        layer.compile(**{**options, "dynamic": dynamic})


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Give a model's layers: of its lists of modules, the one with most parameters; empty where it has no list."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 1]
    return [*max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()), default=[])]


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Count all and trainable parameters, tied ones once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal; what matters is raised or reported by us."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers.logging.set_verbosity(level)
            if bars:
                transformers.logging.enable_progress_bar()


def reason(error: BaseException) -> str:
    """Put an exception of transformers into one line."""
    text = " ".join(str(error).split())
    named = not text or isinstance(error, KeyError)
    return f"{type(error).__name__} {text}".rstrip()[:300] if named else text[:300].rstrip(".")
