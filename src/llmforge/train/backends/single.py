"""One process, one device: the CPU or one CUDA GPU."""

from collections.abc import Iterable
from typing import Any

import torch


class SingleDevice:
    """The backend of a run on one device; sums over ranks are the values themselves."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare(self, model: Any) -> Any:
        return model.to(self.device)

    def total(self, value: float) -> float:
        return value

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
