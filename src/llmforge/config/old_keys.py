"""LLMForge's old keys, and the names that other tools use for ours.

Old keys are read and translated before validation, where they still mean something; a note names the replacement where
they do not. Names of other tools are only suggested, never accepted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Translation = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class OldKey:
    """An old key: what it may hold, what it becomes, and what a person should know.

    `becomes` gets the value and the whole mapping and returns the new keys with their values; None where the key has no
    meaning any more. `json_schema` describes the value.
    """

    json_schema: dict[str, Any]
    note: str
    becomes: Translation | None = None


def _epochs_between(value: int) -> dict[str, Any]:
    return {"checkpoint_and_evaluation_frequency": {"unit": "epochs", "frequency": value}}


def _spread_over_epochs(value: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """At most `value` checkpoints in a run: every ceil(num_epochs / value) epochs, where the epochs are known."""
    epochs = config.get("num_epochs")
    fixed = {"checkpoint_and_evaluation_frequency", "checkpoint_every_n_epochs"} & set(config)
    if fixed or not isinstance(epochs, int) or epochs < 1:
        return {}
    return _epochs_between(-(-epochs // value))


_COUNT = {"type": "integer", "minimum": 1}

OLD_KEYS: dict[str, OldKey] = {
    "checkpoint_every_n_epochs": OldKey(
        _COUNT,
        "is now checkpoint_and_evaluation_frequency: {unit: epochs, frequency: N}, and was read as that",
        lambda value, config: _epochs_between(value),
    ),
    "max_num_checkpoints": OldKey(
        _COUNT,
        "is now checkpoint_and_evaluation_frequency: {unit: epochs, frequency: N}; it was read as that if num_epochs "
        "is set and nothing else says how often, and has no effect otherwise",
        _spread_over_epochs,
    ),
    "min_num_update_steps": OldKey(
        _COUNT, "is now min_update_steps, and was read as that", lambda value, config: {"min_update_steps": value}
    ),
    "no_gradient_checkpoint": OldKey(
        {"type": "boolean"},
        "is now gradient_checkpointing (with the opposite meaning), and was read as that",
        lambda value, config: {"gradient_checkpointing": not value},
    ),
    "num_data_blocks_per_device": OldKey(
        _COUNT, "has no effect: data is split by data_workers; set data_workers, or remove the key"
    ),
    "dataset_size_scaling_factor": OldKey(
        {"type": "number"}, "has no effect: there is no limit on the size of a data set; remove the key"
    ),
    "forward_checkpoint_config": OldKey(
        {"type": "object"}, "has no effect: the artifact is written below output_dir; set output_dir, or remove the key"
    ),
    "webhook_config": OldKey(
        {"type": "object"},
        "has no effect: progress is in events.jsonl and goes to logger; set logger, or remove the key",
    ),
}

# What people write who come from another tool, by section ("" is the top level).
FOREIGN_NAMES: dict[str, dict[str, str]] = {
    "": {
        "batch_size": "train_batch_size_per_device",
        "base_model": "model_id",
        "bf16": "dtype",
        "cutoff_len": "context_length",
        "dataset": "train_path",
        "datasets": "train_path",
        "epochs": "num_epochs",
        "lr": "learning_rate",
        "lr_scheduler": "lr_scheduler_type",
        "max_length": "context_length",
        "max_seq_length": "context_length",
        "micro_batch_size": "train_batch_size_per_device",
        "model": "model_id",
        "model_name_or_path": "model_id",
        "num_train_epochs": "num_epochs",
        "per_device_eval_batch_size": "eval_batch_size_per_device",
        "per_device_train_batch_size": "train_batch_size_per_device",
        "sample_packing": "packing",
        "sequence_len": "context_length",
        "warmup_steps": "num_warmup_steps",
    },
    "lora_config": {"alpha": "lora_alpha", "dropout": "lora_dropout", "lora_r": "r", "rank": "r"},
    "checkpoint_and_evaluation_frequency": {"strategy": "unit", "value": "frequency"},
    "generation_config": {"stop": "stopping_sequences", "stop_token_ids": "stopping_tokens"},
}
