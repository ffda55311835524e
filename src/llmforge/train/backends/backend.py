"""What the loop and its surroundings ask of a backend; they name none."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from llmforge.checkpoint import Checkpoint, State
from llmforge.tasks import Batch, PackedBatch

MicroBatch = Batch | PackedBatch
Filler = Callable[[], MicroBatch]
"""Makes a micro-batch that counts nothing, for a rank that has none left while others compute."""


class Together(Protocol):
    """What ranks do together that is not training; `group` is their process group, None that of training."""

    rank: int
    group: Any

    def total(self, value: float) -> float:
        """Sum a number over all ranks."""


class Backend(Protocol):
    """Everything that touches gradients and training state across devices.

    What is not said to be local is collective: every rank calls it, in the same order. `shards` says that a rank has
    only its part of the parameters, and that forward passes are collective, too; `undoes`, that a backward pass leaves
    nothing behind once the gradients are cleared.
    """

    device: torch.device
    rank: int
    world_size: int
    shards: bool
    undoes: bool

    def prepare(self, model: Any) -> Any:
        """Place or shard a model. The optimizer is built of the parameters that it has then."""

    def equip(self, model: Any, optimizer: torch.optim.Optimizer) -> Any:
        """Bring model and optimizer together; give the model that is to be called."""

    def even(self, batches: Sequence[MicroBatch], filler: Filler) -> Sequence[MicroBatch]:
        """Fill up to the most micro-batches that a rank has, where forward passes are collective."""

    def rounds(self, batches: Iterable[MicroBatch], filler: Filler) -> Iterator[MicroBatch]:
        """Do the same for batches that are made one by one."""

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Give the values of every rank, in the order of ranks."""

    def total(self, value: float) -> float:
        """Sum a number over all ranks."""

    def apart(self) -> Together:
        """Give the ranks a process group of their own, for a thread beside training."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the step's loss; shares add up to the loss over all ranks.

        `last` says that it is the last micro-batch of a step.
        """

    def clip(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        """Put the ranks' gradients together and scale them down to `max_norm` (0 leaves them); return their norm."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the parameters and clear the gradient. Local."""

    def state(self, model: Any, optimizer: torch.optim.Optimizer) -> State:
        """Give what a checkpoint holds, for each rank to write its part."""

    def load(self, checkpoint: Checkpoint, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Restore the optimizer's state, whatever backend and number of ranks wrote it.

        The parameters were read into the model before it was prepared.

        Raises:
            RunError: the checkpoint is damaged or belongs to another model.
        """
