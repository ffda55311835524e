"""Makes the micro-batches of a run: which samples a step has is settled, how they are laid out is decided here."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from llmforge.data.batches import StepPlan, evaluation_batches
from llmforge.data.dataset import Dataset
from llmforge.data.packing import cut_into_packs
from llmforge.data.samples import Sample
from llmforge.models.isolation import Isolation
from llmforge.tasks import Batch, LanguageModeling, PackedBatch

MicroBatches = Sequence[Batch | PackedBatch]

# Tokens of a pack: on a CPU more make nothing faster and keep more activations; on a GPU as many as fit.
_CPU_PACK = 1024
# Row lengths are rounded up to multiples of this, since kernels are made for each new one.
_FILL_TO = {"cpu": 32, "cuda": 8}
_EVALUATED_TOGETHER = 256  # samples of an evaluation that may come into one pack


class Feed:
    """Lays out the samples of steps and evaluations as packs, or where a model cannot have them, as padded rows.

    Args:
        batch_size: sequences of a padded micro-batch in training; a pack has at most as many tokens as they could have.
        rank, world_size: which share of every step and evaluation is laid out.
    """

    def __init__(
        self,
        task: LanguageModeling,
        data: Dataset,
        plan: StepPlan,
        isolation: Isolation,
        *,
        batch_size: int,
        context_length: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._task, self._data, self._plan, self._isolation = task, data, plan, isolation
        self._limit = batch_size * context_length
        self._wanted = min(self._limit, _CPU_PACK) if device.type == "cpu" else self._limit
        self._fill_to = _FILL_TO[device.type]

    def step(self, index: int) -> MicroBatches:
        """Give the micro-batches of a step, counted from 0."""
        if self._isolation.packs:
            return self.lay_out([self._data[i] for i in self._plan.samples(index, self._rank, self._world_size)])
        batches = self._plan.micro_batches(index, self._rank, self._world_size)
        return [self._task.collate([self._data[i] for i in batch]) for batch in batches]

    def filler(self) -> Batch | PackedBatch:
        """Give a small micro-batch that counts nothing, for a rank that has none left."""
        return self.lay_out([self._data[self._plan.shortest]])[0].muted()

    def largest(self) -> Batch | PackedBatch:
        """Give the micro-batch of the first epoch that has the most places, as far as lengths tell."""
        candidates = [batch for index in self._plan.largest_steps() for batch in self.step(index)]
        return max(candidates, key=lambda batch: batch.inputs()["input_ids"].numel()) if candidates else self.filler()

    def evaluation(self, data: Dataset, batch_size: int) -> Iterator[Batch | PackedBatch]:
        """Give every sample of this rank's share once, in padded rows of so many sequences or in packs."""
        size = batch_size
        if self._isolation.packs:
            size = min(_EVALUATED_TOGETHER, -(-len(data) // self._world_size))
        for indices in evaluation_batches(data.lengths, size)[self._rank :: self._world_size]:
            yield from self.lay_out([data[i] for i in indices])

    def lay_out(self, samples: Sequence[Sample]) -> MicroBatches:
        """Lay out any samples: as packs, or as one padded micro-batch."""
        if not samples:
            return []
        if not self._isolation.packs:
            return [self._task.collate(samples)]
        share = self._isolation.shares
        packs = cut_into_packs(samples, share=share, wanted=self._wanted, limit=self._limit)
        return [self._task.pack(part, share=share, fill_to=self._fill_to) for part in packs]


class Ahead:
    """Makes a step's micro-batches while the step before it is computed.

    Use as a context: leaving it waits for the last one.
    """

    def __init__(self, make: Callable[[int], MicroBatches], last: int) -> None:
        self._make, self._last = make, last
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[MicroBatches]] | None = None

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, index: int) -> MicroBatches:
        """Give the micro-batches of a step, and begin with those of the next one.

        Raises what making them raised.
        """
        prepared = self._next
        batches = prepared[1].result() if prepared is not None and prepared[0] == index else self._make(index)
        self._next = (index + 1, self._pool.submit(self._make, index + 1)) if index + 1 < self._last else None
        return batches
