"""The config after everything open has been decided: small frozen sections, and the origin of every value.

`resolve` is called once, when the data has been measured and the model's facts are known. `train/run.py` hands each
part of a run its own section; nobody below it sees the whole. This module must not look at data, models or hardware:
what depends on them arrives as `Derived` values.
"""

import getpass
import json
import re
import secrets
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from llmforge.config import derive
from llmforge.config.derive import Derived
from llmforge.config.load import LoadedConfig, Origin
from llmforge.config.lora_schema import LoraConfig
from llmforge.config.schema import TASK_SECTIONS, FineTuningConfig, GenerationConfig, TaskName
from llmforge.config.section import Section
from llmforge.config.yaml_source import KeyPath, dotted, scalar_is_plain_text

# What only the run can know; `resolve` must be given each of these that the user left open.
NEEDED = (
    "context_length",
    "num_epochs",
    "train_batch_size_per_device",
    "gradient_accumulation_steps",
    "dtype",
)

# Why a key may stay without a value.
_UNSET_MEANS = {
    "revision": "the hub's default branch",
    "initial_base_model_ckpt_path": "the weights of model_id",
    "initial_adapter_model_ckpt_path": "a fresh adapter, if any",
    "valid_path": "no evaluation",
    "padding": "sequences are packed; where a model cannot have that, padded to the longest",
    "classifier_config": "not the task",
    "preference_tuning_config": "not the task",
    "vision_language_config": "not the task",
    "deepspeed": "not used",
    "liger_kernel": "not used",
    "torch_compile_config": "not compiled",
    "lora_config": "all parameters are trained",
    "logger": "events.jsonl only",
    "generation_config.prompt_format": "the tokenizer's own chat template",
    "torch_compile_config.dynamic": "torch decides",
    "vision_language_config.max_image_pixels": "images keep their size",
    "preference_tuning_config.logprob_processor_scaling_config": "in this process",
}

# PEFT's fields that are written out even when the user left them open; the others stay with PEFT.
_LORA_WRITTEN = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "task_type")


@dataclass(frozen=True, slots=True)
class ModelSection:
    """Which weights, and what may be done to load them. Paths are as the user wrote them; `{repo_id: …}` is the id."""

    model_id: str
    revision: str | None
    trust_remote_code: bool
    allow_pickle_weights: tuple[str, ...]
    initial_base_model: str | None
    added_tokens: tuple[str, ...]
    quantization: Literal["none", "8bit", "4bit"]


@dataclass(frozen=True, slots=True)
class AdapterSection:
    """The LoRA adapter: fields for PEFT's `LoraConfig` (plain lists and dicts), and an adapter to continue from."""

    options: Mapping[str, Any]
    initial_adapter: str | None


@dataclass(frozen=True, slots=True)
class DataSection:
    """Rows: where they are, how they are read, and how they become sequences."""

    train_path: str | tuple[str, ...]
    valid_path: str | tuple[str, ...] | None
    data_format: str
    columns: Mapping[str, str]
    on_bad_row: Literal["error", "skip"]
    cache_dir: str
    workers: int
    context_length: int
    overlong: Literal["truncate", "drop", "error"]
    packing: Literal["auto"] | bool
    padding: Literal["longest", "max_length"] | None


@dataclass(frozen=True, slots=True)
class TaskSection:
    """The task, and its own options as a section of the schema (None for tasks without any)."""

    name: TaskName
    options: Section | None


@dataclass(frozen=True, slots=True)
class GenerationSection:
    """How messages become text and where generation ends.

    `prompt_format` holds the keys that were set, or is None for the tokenizer's own chat template.
    """

    prompt_format: Mapping[str, Any] | None
    stopping_sequences: tuple[str, ...]
    stopping_tokens: tuple[int, ...]
    generate_kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class OptimizationSection:
    """What an optimizer step is, and how many there are."""

    num_epochs: int
    min_update_steps: int
    train_batch_size_per_device: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler_type: Literal["cosine", "linear", "constant"]
    num_warmup_steps: int
    optimizer: Literal["adamw", "sgd", "adafactor"]
    weight_decay: float
    max_grad_norm: float
    seed: int


@dataclass(frozen=True, slots=True)
class SpeedSection:
    """Number format, and what trades memory, time and compatibility."""

    dtype: Literal["bf16", "fp32"]
    flash_attention_2: bool
    gradient_checkpointing: bool
    torch_compile: Mapping[str, Any] | None
    liger_kernel: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class DevicesSection:
    """How many devices, where they are, and how they share the work."""

    num_devices: int
    worker_resources: Mapping[str, float]
    trainer_resources: Mapping[str, float]
    deepspeed_config_path: str | None
    parallel: Literal["ddp", "fsdp2", "deepspeed"]
    fsdp_cpu_offload: bool
    max_failures: int
    worker_timeout: int


@dataclass(frozen=True, slots=True)
class CheckpointSection:
    """When the model is evaluated and a checkpoint written, and how many are kept."""

    unit: Literal["epochs", "steps"]
    frequency: int
    num_checkpoints_to_keep: int
    eval_first: bool
    eval_batch_size_per_device: int


@dataclass(frozen=True, slots=True)
class LoggerSection:
    """The tracking service."""

    provider: Literal["wandb", "mlflow", "tensorboard", "trackio"]
    provider_config: Mapping[str, Any]
    rank_zero_only: bool


@dataclass(frozen=True, slots=True)
class OutputSection:
    """Where the run directory is made, and the run's name."""

    output_dir: str
    tag: str


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """Every value that a run uses, in sections; flat in `values` (plain data), with `origins` by dotted key."""

    model: ModelSection
    adapter: AdapterSection | None
    data: DataSection
    task: TaskSection
    generation: GenerationSection
    optimization: OptimizationSection
    speed: SpeedSection
    devices: DevicesSection
    checkpoint: CheckpointSection
    logger: LoggerSection | None
    output: OutputSection
    values: Mapping[str, Any]
    origins: Mapping[str, Origin]

    def to_yaml(self) -> str:
        """Write a flat config that `load_config` reads back to the same values, each line with its origin."""
        return "".join(_yaml_lines(self.values, (), self.origins))


def resolve(
    loaded: LoadedConfig, derived: Mapping[str, Derived], located: Mapping[str, Any] | None = None
) -> ResolvedConfig:
    """Decide every key that the user left open, from `derived` or by rule, and regroup the config into sections.

    `derived` is keyed by the names of the config; entries for keys that the user set are not used. It must have those
    of `NEEDED` that the user left open: anything else is a programming error.
    """
    config = loaded.config
    origins = dict(loaded.origins)
    values = {key: _plain(value) for key, value in config}
    values |= located or {}

    def decide(key: str, rule: Derived) -> None:
        if values[key] is None or values[key] == "auto":
            chosen = derived.get(key, rule)
            values[key] = chosen.value
            origins[key] = Origin("derived", chosen.reason)

    for key in NEEDED:
        assert values[key] is not None or key in derived, f"resolve() needs a derived value for {key}"
        if values[key] is None:
            decide(key, derived[key])

    section = next((key for key in TASK_SECTIONS if values[key] is not None), None)
    decide(
        "task",
        Derived(TASK_SECTIONS[section], f"{section} is given")
        if section
        else Derived("causal_lm", "no task's section is given"),
    )
    lora = config.lora_config
    decide(
        "learning_rate",
        Derived(1e-4, "usual for LoRA") if lora else Derived(1e-5, "usual where all parameters are trained"),
    )
    decide("eval_batch_size_per_device", derive.eval_batch_size(values["train_batch_size_per_device"]))
    if values["padding"] is not None:
        decide("packing", Derived(False, "padding is set"))
    elif values["packing"] is False:
        decide("padding", Derived("longest", "sequences are not packed"))
    decide(
        "parallel",
        Derived("deepspeed", "deepspeed is given") if config.deepspeed else Derived("ddp", "a model fits on a device"),
    )
    decide("flash_attention_2", Derived(False, "not asked for"))
    decide("gradient_checkpointing", Derived(False, "not asked for"))
    decide("data_workers", derive.data_workers())
    decide("cache_dir", derive.cache_dir())
    decide("custom_model_tag", _tag(config.model_id))
    if lora is not None and lora.lora_alpha is None:
        values["lora_config"]["lora_alpha"] = 2 * lora.r
        origins["lora_config.lora_alpha"] = Origin("derived", "2 × r")
    for key, reason in _UNSET_MEANS.items():
        if key not in origins or origins[key].kind == "default":
            origins[key] = Origin("default", f"not set: {reason}" if _value(values, key) is None else "default")
    return _regrouped(config, values, origins)


def _regrouped(config: FineTuningConfig, values: dict[str, Any], origins: dict[str, Origin]) -> ResolvedConfig:
    generation, frequency = config.generation_config, config.checkpoint_and_evaluation_frequency
    deepspeed, logger = config.deepspeed, config.logger
    options = (config.classifier_config, config.preference_tuning_config, config.vision_language_config)
    adapter = None
    if values["lora_config"] is not None:
        adapter = AdapterSection(values["lora_config"], _address(values["initial_adapter_model_ckpt_path"]))
    return ResolvedConfig(
        model=ModelSection(
            model_id=values["model_id"],
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            allow_pickle_weights=config.allow_pickle_weights,
            initial_base_model=_address(values["initial_base_model_ckpt_path"]),
            added_tokens=config.added_tokens,
            quantization=config.quantization,
        ),
        adapter=adapter,
        data=DataSection(
            train_path=values["train_path"],
            valid_path=values["valid_path"],
            data_format=config.data_format,
            columns=config.columns,
            on_bad_row=config.on_bad_row,
            cache_dir=values["cache_dir"],
            workers=values["data_workers"],
            context_length=values["context_length"],
            overlong=config.overlong,
            packing=values["packing"],
            padding=values["padding"],
        ),
        task=TaskSection(
            name=values["task"],
            options=next((section for section in options if section is not None), None),
        ),
        generation=GenerationSection(
            prompt_format=values["generation_config"]["prompt_format"],
            stopping_sequences=generation.stopping_sequences,
            stopping_tokens=generation.stopping_tokens,
            generate_kwargs=generation.generate_kwargs,
        ),
        optimization=OptimizationSection(
            num_epochs=values["num_epochs"],
            min_update_steps=config.min_update_steps,
            train_batch_size_per_device=values["train_batch_size_per_device"],
            gradient_accumulation_steps=values["gradient_accumulation_steps"],
            learning_rate=values["learning_rate"],
            lr_scheduler_type=config.lr_scheduler_type,
            num_warmup_steps=config.num_warmup_steps,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
        ),
        speed=SpeedSection(
            dtype=values["dtype"],
            flash_attention_2=values["flash_attention_2"],
            gradient_checkpointing=values["gradient_checkpointing"],
            torch_compile=values["torch_compile_config"],
            liger_kernel=values["liger_kernel"],
        ),
        devices=DevicesSection(
            num_devices=config.num_devices,
            worker_resources=config.worker_resources,
            trainer_resources=config.trainer_resources,
            deepspeed_config_path=values["deepspeed"]["config_path"] if deepspeed else None,
            parallel=values["parallel"],
            fsdp_cpu_offload=config.fsdp_cpu_offload,
            max_failures=config.max_failures,
            worker_timeout=config.worker_timeout,
        ),
        checkpoint=CheckpointSection(
            unit=frequency.unit,
            frequency=frequency.frequency,
            num_checkpoints_to_keep=config.num_checkpoints_to_keep,
            eval_first=config.eval_first,
            eval_batch_size_per_device=values["eval_batch_size_per_device"],
        ),
        logger=LoggerSection(logger.provider, logger.provider_config, logger.rank_zero_only) if logger else None,
        output=OutputSection(output_dir=values["output_dir"], tag=values["custom_model_tag"]),
        values=values,
        origins=origins,
    )


def _plain(value: Any) -> Any:
    """Return a value as plain data: dicts, lists and scalars, without the nested keys that have no say."""
    if not isinstance(value, Section):
        return list(value) if isinstance(value, tuple) else value
    if isinstance(value, LoraConfig):
        return value.model_dump(mode="json", include={*value.model_fields_set, *_LORA_WRITTEN})
    if isinstance(value, GenerationConfig):
        plain = value.model_dump(mode="json", exclude={"prompt_format"})
        format = value.prompt_format
        return {"prompt_format": format.model_dump(mode="json", exclude_unset=True) if format else None, **plain}
    return value.model_dump(mode="json")


def _value(values: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key, None where there is none."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _address(initial: str | Mapping[str, str] | None) -> str | None:
    return initial["repo_id"] if isinstance(initial, Mapping) else initial


def _tag(model_id: str) -> Derived:
    """Make `{model_id}:{user[:5]}:{5 letters}`; of a path only the last part."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # an account without a name, as in some containers
        user = "user"
    name = model_id
    if name.startswith(("/", ".", "~")) or "://" in name or name.endswith(".gguf") or name.count("/") > 1:
        name = PurePath(name.rstrip("/")).name.removesuffix(".gguf")
    letters = "".join(secrets.choice(string.ascii_lowercase) for _ in range(5))
    return Derived(f"{name}:{user[:5]}:{letters}", "model, user and five random letters")


# --- writing YAML -----------------------------------------------------------------------------------------------------

_PLAIN_TEXT = re.compile(r"[A-Za-z_./][\w./@+-]*")


def _yaml_lines(values: Mapping[str, Any], path: KeyPath, origins: Mapping[str, Origin]) -> Iterator[str]:
    indent = "  " * len(path)
    for key, value in values.items():
        here = (*path, key)
        comment = _comment(here, origins)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{_scalar(key)}:  # {comment}\n"
            yield from _yaml_lines(value, here, origins)
        else:
            yield f"{indent}{_scalar(key)}: {_flow(value)}  # {comment}\n"


def _comment(path: KeyPath, origins: Mapping[str, Origin]) -> str:
    origin = origins.get(dotted(path)) or Origin("default", "default")
    return " ".join(str(origin).split())


def _flow(value: Any) -> str:
    """Write a value on one line."""
    match value:
        case Mapping():
            return "{" + ", ".join(f"{_scalar(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(_flow(inner) for inner in value) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float():
            # `1e-05` without a point is text to other YAML readers.
            text = repr(value).replace("inf", ".inf").replace("nan", ".nan")
            return text if "." in text or "e" not in text else text.replace("e", ".0e")
        case int():
            return str(value)
    text = str(value)
    if _PLAIN_TEXT.fullmatch(text) and scalar_is_plain_text(text):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else _escaped(char) for char in quoted)


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
