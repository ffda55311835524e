"""Which valid configs this version cannot run, and how to say so. Nothing here is wrong with the config itself."""

from collections.abc import Iterator

from llmforge.config.load import LoadedConfig
from llmforge.config.schema import TASK_SECTIONS
from llmforge.errors import NotAvailableError

AVAILABLE_TASKS = ("instruction_tuning", "causal_lm")
# PEFT options that need a pass over the data, or another library, before training starts.
_UNAVAILABLE_LORA = {
    "eva_config": "EVA needs a pass over the data before training",
    "corda_config": "CorDA needs a pass over the data before training",
    "lora_ga_config": "LoRA-GA needs a pass over the data before training",
    "arrow_config": "Arrow routes between adapters that are already trained",
    "megatron_config": "Megatron's parallel layers are not supported",
    "megatron_core": "Megatron's parallel layers are not supported",
    "use_qalora": "QA-LoRA needs a quantised base model",
    "runtime_config": "its only option moves GPU work, for quantised models",
}


def unavailable(loaded: LoadedConfig) -> list[tuple[str, str]]:
    """Return (dotted key, what this version cannot do and what to change) for every such request."""
    return list(_requests(loaded))


def refuse_unavailable(loaded: LoadedConfig) -> None:
    """Raise NotAvailableError, with every request that this version cannot fulfil, each with its place."""
    _refuse(loaded, unavailable(loaded))


def refuse_unavailable_task(loaded: LoadedConfig) -> None:
    """Raise NotAvailableError if the config asks for a task that this version does not have."""
    _refuse(loaded, [request for request in unavailable(loaded) if request[0] in ("task", *TASK_SECTIONS)])


def _refuse(loaded: LoadedConfig, requests: list[tuple[str, str]]) -> None:
    if not requests:
        return
    errors = [loaded.error(key, text, NotAvailableError) for key, text in requests]
    errors.sort(key=lambda error: (error.line is None, error.line or 0))
    first, *others = errors
    raise NotAvailableError(
        "\n".join([first.message, *(str(other) for other in others)]), file=first.file, line=first.line
    )


def _requests(loaded: LoadedConfig) -> Iterator[tuple[str, str]]:
    config = loaded.config
    if config.cache_dir is not None and config.cache_dir.startswith(("s3://", "gs://")):
        yield "cache_dir", f"given {config.cache_dir}; the cache is on a local disk always; give a local path"

    sections = [key for key in TASK_SECTIONS if key in config.model_fields_set]
    for key in sections:
        yield key, f"the task {TASK_SECTIONS[key]} is not available in this version; remove {key}"
    if config.task is not None and config.task not in AVAILABLE_TASKS:
        yield (
            "task",
            f"given {config.task}; available in this version: {', '.join(AVAILABLE_TASKS)}; choose one of them",
        )

    if config.quantization != "none":
        yield (
            "quantization",
            f"given {config.quantization}; quantised base weights are not available in this version; "
            "set quantization: none",
        )
    if config.lora_config is not None:
        for key, why in _UNAVAILABLE_LORA.items():
            if key in config.lora_config.model_fields_set:
                yield f"lora_config.{key}", f"{why}, which is not available in this version; remove it"
        start = config.lora_config.init_lora_weights
        if start in ("eva", "corda", "lora_ga"):
            yield (
                "lora_config.init_lora_weights",
                f"given {start}; it needs a pass over the data before training, which is not available in this "
                "version; remove it",
            )
