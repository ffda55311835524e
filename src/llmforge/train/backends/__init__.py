"""One file per way of spreading a step over devices.

A backend owns backward, clipping, the update, sums over ranks, and what of the state each rank has.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from llmforge.train.backends.backend import Backend
from llmforge.train.backends.single import SingleDevice

__all__ = ["Backend", "SingleDevice", "make_backend"]


def make_backend(
    kind: Literal["auto", "ddp", "fsdp2", "deepspeed"],
    device: torch.device,
    *,
    bf16: bool,
    offload: bool,
    deepspeed: Path | None,
    micro_batch: int,
    max_grad_norm: float,
    hidden_size: int,
) -> Backend:
    """Make the backend for the process group that is there; without one, that of a single device.

    Args:
        bf16: whether forward passes compute in bf16.
        offload: whether fsdp2 keeps its state in the host's memory.
        deepspeed: DeepSpeed's JSON file.
        micro_batch, max_grad_norm, hidden_size: what the values "auto" in that file follow from.

    Raises:
        ConfigError: DeepSpeed's file cannot be used, or its package is missing.
    """
    if kind == "deepspeed":
        from llmforge.train.backends.zero import DeepSpeed, filled, read_config

        assert deepspeed is not None
        config = filled(
            read_config(deepspeed),
            world_size=dist.get_world_size() if dist.is_initialized() else 1,
            micro_batch=micro_batch,
            max_grad_norm=max_grad_norm,
            hidden_size=hidden_size,
            bf16=bf16,
        )
        if dist.is_initialized():
            return DeepSpeed(device, config)
    if not dist.is_initialized():
        return SingleDevice(device)
    if kind == "fsdp2":
        from llmforge.train.backends.fsdp2 import FullyShard

        return FullyShard(device, bf16=bf16, offload=offload)
    from llmforge.train.backends.ddp import DataParallel

    return DataParallel(device)
