"""What the loop asks of a backend; it names none."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch


class Backend(Protocol):
    """Everything that touches gradients across devices."""

    device: torch.device
    rank: int
    world_size: int

    def prepare(self, model: Any) -> Any:
        """Place or wrap a model."""

    def total(self, value: float) -> float:
        """Sum a number over all ranks."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's share of the step's loss; shares add up to the loss over all ranks."""

    def clip(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale the gradient down to `max_norm` (0 leaves it as it is); return its norm before, on the device."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the parameters and clear the gradient."""
