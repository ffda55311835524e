"""What the machine at hand can do: its device, its memory, whether it computes bf16 well."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import psutil
import torch

Dtype = Literal["bf16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def find_device() -> torch.device:
    """Give this process's CUDA GPU (the first, unless one was chosen), or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Name a device as its maker does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def best_dtype(device: torch.device) -> tuple[Dtype, str]:
    """Choose bf16 where the hardware computes it natively, else fp32; with the reason in words."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU computes bf16"
        return "fp32", "the GPU does not compute bf16"
    capabilities = torch.cpu.get_capabilities()
    for feature in ("amx_bf16", "avx512_bf16"):
        if capabilities.get(feature):
            return "bf16", f"the CPU has {feature}"
    return "fp32", "the CPU has neither amx_bf16 nor avx512_bf16"


def free_memory(device: torch.device) -> int:
    """Give the bytes of memory that are free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def autocast(device: torch.device, dtype: Dtype) -> Callable[[], AbstractContextManager]:
    """Give the context for forward passes: matrix products in bf16, or everything as it is in fp32."""
    if dtype == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
