"""What backends of several ranks have in common: who they are, and how they count together.

Numbers that the host needs travel between hosts' memories (gloo), so that no device has to be waited for.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from llmforge.train.backends.backend import Filler, MicroBatch


class Ranks:
    """The ranks of a process group, which has to know gloo for what lies in the host's memory.

    Args:
        group: None is the one that all ranks train in.
    """

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self.device = device
        self.group = group
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor(values, dtype=torch.float64)
        everyones = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyones, mine, group=self.group)
        return [row.tolist() for row in everyones]

    def total(self, value: float) -> float:
        return sum(row[0] for row in self.gather([value]))  # in the order of ranks: the same sum everywhere

    def apart(self) -> "Ranks":
        return Ranks(torch.device("cpu"), dist.new_group(backend="gloo"))


class RanksInStep(Ranks):
    """Ranks whose forward passes are collective, because each holds a part of the parameters."""

    def even(self, batches: Sequence[MicroBatch], filler: Filler) -> Sequence[MicroBatch]:
        most = int(max(row[0] for row in self.gather([len(batches)])))
        return [*batches, *(filler() for _ in range(most - len(batches)))]

    def rounds(self, batches: Iterable[MicroBatch], filler: Filler) -> Iterator[MicroBatch]:
        own = iter(batches)
        while True:
            batch = next(own, None)
            if not self.total(float(batch is not None)):
                return
            yield filler() if batch is None else batch
