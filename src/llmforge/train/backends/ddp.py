"""Data parallel: every rank holds the whole model, computes its share of a step, and gradients are summed.

It is PyTorch's DDP (https://arxiv.org/abs/2006.15704) without its wrapper: that asks every rank for as many
micro-batches, every parameter for a gradient each time, and for the loss to come out of the wrapped forward. A rank may
have no micro-batch in a step here. What is given up is overlap: gradients travel after a step's last backward pass, in
buckets; adapters are small, and full-parameter training on several GPUs belongs to fsdp2.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from llmforge.train.backends.ranks import Ranks
from llmforge.train.backends.single import WholeModel

_BUCKET_BYTES = 64 << 20


class DataParallel(WholeModel, Ranks):
    """The backend `ddp`."""

    def equip(self, model: Any, optimizer: torch.optim.Optimizer) -> Any:
        for parameter in _trained(model.parameters()):  # new adapters are drawn from one seed; make sure of it
            dist.broadcast(parameter.detach(), src=0)
        return model

    def clip(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        trained = _trained(parameters)
        used = self.gather([float(parameter.grad is not None) for parameter in trained])
        for parameter, anywhere in zip(trained, map(any, zip(*used, strict=True)), strict=True):
            # A part of the model (an expert, say) that only other ranks' examples used. What nobody used stays without
            # a gradient, and so without an update, as on one device.
            if parameter.grad is None and anywhere:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in trained if p.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, sum_ in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(sum_.view_as(gradient))
        return torch.nn.utils.clip_grad_norm_(trained, max_norm or float("inf"))


def _trained(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Cut gradients into groups of one number format and some 64 MB."""
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size >= _BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
    if bucket:
        yield bucket
