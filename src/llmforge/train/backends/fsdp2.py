"""Fully sharded data parallel: PyTorch's FSDP2 (`fully_shard`, https://arxiv.org/abs/2304.11277).

Every rank holds a part of each parameter, of its gradient and of the optimizer's state. A layer is put together when it
computes, forward and backward, and taken apart again.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llmforge.checkpoint import State
from llmforge.models.load import layers_of
from llmforge.train.backends.ranks import RanksInStep
from llmforge.train.backends.single import TorchUpdates


class FullyShard(TorchUpdates, RanksInStep):
    """The backend `fsdp2`.

    Args:
        bf16: gather trained parameters in bf16, in which they are computed with; gradients are summed in fp32.
        offload: keep parameters, gradients and optimizer state in the host's memory, where a CPU has them anyway.
    """

    shards = True

    def __init__(self, device: torch.device, *, bf16: bool, offload: bool = False) -> None:
        super().__init__(device)
        self._bf16, self._offload = bf16, offload and device.type != "cpu"

    def prepare(self, model: Any) -> Any:
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        trained_formats = {p.dtype for p in model.parameters() if p.requires_grad}
        everything_trained = all(p.requires_grad for p in model.parameters())
        # Under an adapter frozen weights are bf16 already, and trained ones few.
        narrow = torch.bfloat16 if self._bf16 and everything_trained and trained_formats == {torch.float32} else None
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32 if narrow else None),
            "offload_policy": CPUOffloadPolicy() if self._offload else OffloadPolicy(),
        }
        for layer in layers_of(model):
            fully_shard(layer, **options)
        fully_shard(model, **options)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a step's loss is divided by its weight over all ranks already
                module.set_force_sum_reduction_for_comms(True)  # gloo has no operation that multiplies, too
        return model

    def clip(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def state(self, model: Any, optimizer: torch.optim.Optimizer) -> State:
        for module in model.modules():  # an evaluation leaves the outermost layers whole
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().state(model, optimizer)
