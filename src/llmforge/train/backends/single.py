"""One process, one device: the CPU or one CUDA GPU."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from llmforge.checkpoint import Checkpoint, State, load_optimizer, state_of
from llmforge.train.backends.backend import Filler, MicroBatch


class TorchUpdates:
    """What is the same wherever an optimizer of torch's updates parameters of torch's, whole or in parts."""

    undoes = True

    def equip(self, model: Any, optimizer: torch.optim.Optimizer) -> Any:
        return model

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def state(self, model: Any, optimizer: torch.optim.Optimizer) -> State:
        return state_of(model, optimizer)

    def load(self, checkpoint: Checkpoint, model: Any, optimizer: torch.optim.Optimizer) -> None:
        load_optimizer(checkpoint, model, optimizer)


class WholeModel(TorchUpdates):
    """What is the same wherever a rank holds the whole model, so that it computes without the others."""

    device: torch.device
    shards = False

    def prepare(self, model: Any) -> Any:
        return model.to(self.device)

    def even(self, batches: Sequence[MicroBatch], filler: Filler) -> Sequence[MicroBatch]:
        return batches

    def rounds(self, batches: Iterable[MicroBatch], filler: Filler) -> Iterator[MicroBatch]:
        return iter(batches)


class SingleDevice(WholeModel):
    """The backend of a run on one device; sums over ranks are the values themselves."""

    rank = 0
    world_size = 1
    group = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        return [list(values)]

    def total(self, value: float) -> float:
        return value

    def apart(self) -> "SingleDevice":
        return self

    def clip(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
