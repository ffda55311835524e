"""Values for keys that the user left open, from facts about data, model and hardware, each with its reason.

Pure functions of plain numbers: this module must not look at a file, a model or a device itself.
"""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

EXAMPLES_PER_STEP = 16
_LARGEST_BATCH = 16
_LARGEST_BATCH_ON_CPU = 8

# What a decoder layer (attention, gated MLP) keeps per token for the backward pass, in values, in units of hidden_size.
_ACTIVATIONS_PER_LAYER = 24
_FULL_STATE = 16  # bytes of a parameter that is trained: its value, its gradient and Adam's two moments in fp32
# The share of the memory that is planned with; the rest is for fragments, buffers and what the formula leaves out.
_USABLE = 0.8


@dataclass(frozen=True, slots=True)
class Derived:
    """A value for a key that was not set, and why it is this one."""

    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """What the memory of a training step depends on.

    `available_bytes` is what the device has free before the model is loaded; `bytes_per_value` is 2 for bf16, 4 for
    fp32.
    """

    available_bytes: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    bytes_per_value: int
    is_lora: bool
    gradient_checkpointing: bool
    on_cpu: bool


def context_length(longest_sample: int, native_context_length: int | None) -> Derived:
    """Return the smallest multiple of 64 that holds the longest sample (tokens), at most the model's native length."""
    wanted = max(64, math.ceil(longest_sample / 64) * 64)
    if native_context_length is not None and wanted > native_context_length:
        why = f"the model's native length; the longest sample has {longest_sample} tokens"
        if longest_sample <= native_context_length:
            why = f"the model's native length, which holds the longest sample ({longest_sample} tokens)"
        return Derived(native_context_length, why)
    return Derived(wanted, f"smallest multiple of 64 that holds the longest sample ({longest_sample} tokens)")


def num_epochs(min_update_steps: int, steps_per_epoch: int) -> Derived:
    """Return the epochs that make at least `min_update_steps` optimizer steps."""
    return Derived(
        math.ceil(min_update_steps / steps_per_epoch),
        f"min_update_steps {min_update_steps} / {steps_per_epoch} steps per epoch, rounded up",
    )


def gradient_checkpointing(memory: MemoryFacts, tokens: int) -> Derived:
    """Return True where a micro-batch of so many tokens fits into memory only if activations are computed again."""
    gib = memory.available_bytes / 2**30
    if tokens <= tokens_that_fit(memory):
        return Derived(False, f"the activations of {tokens} tokens fit into {gib:.1f} GiB")
    return Derived(True, f"the activations of {tokens} tokens do not fit into {gib:.1f} GiB")


def train_batch_size(memory: MemoryFacts, context_length: int) -> Derived:
    """Return the sequences per device that fit into memory: a power of two, at most 16, on a CPU at most 8."""
    fitting = tokens_that_fit(memory) / context_length
    limit = _LARGEST_BATCH_ON_CPU if memory.on_cpu else _LARGEST_BATCH
    size = 1
    while size * 2 <= min(fitting, limit):
        size *= 2
    gib = memory.available_bytes / 2**30
    if fitting < 1:
        return Derived(1, f"the least there is; {gib:.1f} GiB of memory may be too little at {context_length} tokens")
    place = "on a CPU" if memory.on_cpu else "per device"
    if size == limit:
        return Derived(size, f"the most that is chosen {place}; fits into {gib:.1f} GiB")
    return Derived(size, f"largest power of two that fits into {gib:.1f} GiB at {context_length} tokens")


def tokens_that_fit(memory: MemoryFacts) -> float:
    """Return how many tokens of a micro-batch fit into memory, as estimated; it can be less than 0.

    With h hidden_size, L num_layers, V vocab_size, b bytes_per_value:

        parameters   = 12·L·h² + 2·V·h
        state        = parameters × b               LoRA: the base weights; the adapter is small
                     = parameters × 16              full: weights, gradients, two moments of Adam, all fp32
        per token    = 24·L·h × b                   every layer's activations, for the backward pass
                     = (L + 24)·h × b               with checkpointing: each layer's input, and one layer's own
        tokens       = (0.8 × available - state) / per token

    Logits are not in it: they are there for a few places at a time.
    """
    h, layers, width = memory.hidden_size, memory.num_layers, memory.bytes_per_value
    parameters = 12 * layers * h * h + 2 * memory.vocab_size * h
    state = parameters * (width if memory.is_lora else _FULL_STATE)
    kept = layers + _ACTIVATIONS_PER_LAYER if memory.gradient_checkpointing else _ACTIVATIONS_PER_LAYER * layers
    return (_USABLE * memory.available_bytes - state) / max(1, kept * h * width)


def parallel(memory: MemoryFacts, context_length: int, num_devices: int) -> Derived:
    """Return how several devices share the work: ddp where each can hold the whole state, else fsdp2."""
    if num_devices == 1:
        return Derived("ddp", "there is one device")
    gib = memory.available_bytes / 2**30
    if tokens_that_fit(memory) >= context_length:
        return Derived("ddp", f"the whole state of training fits into the {gib:.1f} GiB of a device")
    return Derived("fsdp2", f"the state of training does not fit into the {gib:.1f} GiB of a device")


def eval_batch_size(train_batch_size: int) -> Derived:
    """Return twice the training batch size: evaluation keeps no activations."""
    return Derived(2 * train_batch_size, "twice train_batch_size_per_device: no activations are kept")


def gradient_accumulation_steps(train_batch_size: int, *, chosen_by_user: bool, num_devices: int = 1) -> Derived:
    """Return the forward passes per step that make about 16 examples; 1 where the user chose the batch size."""
    if chosen_by_user:
        return Derived(1, "train_batch_size_per_device is set")
    together = train_batch_size * num_devices
    steps = max(1, round(EXAMPLES_PER_STEP / together))
    devices = "" if num_devices == 1 else f" × {num_devices} devices"
    return Derived(steps, f"{steps} × {train_batch_size}{devices} = {steps * together} examples per optimizer step")


def dtype(*, has_bf16: bool, device: str) -> Derived:
    """Return bf16 where the hardware computes in it, else fp32. `device` names the hardware for the reason."""
    value: Literal["bf16", "fp32"] = "bf16" if has_bf16 else "fp32"
    return Derived(value, f"{device} {'has' if has_bf16 else 'has no'} bf16 arithmetic")


def data_workers() -> Derived:
    """Return the number of CPU cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Derived(cores, "number of CPU cores")


def cache_dir(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Derived:
    """Return the platform's directory for caches."""
    if environment.get("XDG_CACHE_HOME"):
        return Derived(str(Path(environment["XDG_CACHE_HOME"]) / "llmforge"), "XDG_CACHE_HOME")
    base = Path.home() / ("Library/Caches" if platform == "darwin" else ".cache")
    return Derived(str(base / "llmforge"), "the platform's cache directory")
