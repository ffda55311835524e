"""Which samples make up which step: a plan without state, so that a resumed run and any split see the same examples.

It deals in indices and lengths; it never sees a sample.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class StepPlan:
    """Cuts each epoch's permutation of the samples into steps, and each step into micro-batches.

    The samples of a step depend on the seed, the epoch and their number in a step, which is `examples_per_micro_batch *
    micro_batches_per_step`, and not on how that product is split. Within a step, samples of similar length share a
    micro-batch, so that little is padded; the longest come first, so that memory runs out at once or not at all.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, examples_per_micro_batch: int, micro_batches_per_step: int, seed: int
    ) -> None:
        self._lengths = np.asarray(lengths)
        self._micro_batch = examples_per_micro_batch
        self._step = examples_per_micro_batch * micro_batches_per_step
        self._seed = seed
        self._permutation = lru_cache(maxsize=2)(self._draw)  # around an epoch's end, both are asked for

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch; the last one has fewer samples where they do not divide."""
        return -(-len(self._lengths) // self._step)

    def samples(self, step: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return the sample indices of a step, counted from 0 over all epochs; of several ranks, this one's.

        Which samples a step has does not depend on the ranks: these share them out so that each has about as many
        tokens.
        """
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self._step
        samples = self._permutation(epoch)[start : start + self._step]
        if world_size > 1:
            samples = samples[_shares(self._lengths[samples], world_size) == rank]
        return samples.tolist()

    def largest_steps(self) -> list[int]:
        """Return the first epoch's steps that need most memory: of most tokens, and with the longest sample."""
        lengths = self._lengths[self._permutation(0)]
        starts = np.arange(0, len(lengths), self._step)
        sums, longest = np.add.reduceat(lengths, starts), np.maximum.reduceat(lengths, starts)
        return sorted({int(sums.argmax()), int(longest.argmax())})

    def micro_batches(self, step: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """Return the sample indices of each padded micro-batch of a step; of several ranks, this one's."""
        return _cut(np.array(self.samples(step, rank, world_size), dtype=np.int64), self._lengths, self._micro_batch)

    @property
    def shortest(self) -> int:
        """The index of the shortest sample."""
        return int(self._lengths.argmin())

    def _draw(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(len(self._lengths))


def _shares(lengths: np.ndarray, world_size: int) -> np.ndarray:
    """Give each sample a rank: the longest first, each to the rank with the fewest tokens so far."""
    tokens = [0] * world_size
    ranks = np.empty(len(lengths), dtype=np.int64)
    for sample in np.argsort(-lengths, kind="stable"):
        ranks[sample] = rank = min(range(world_size), key=tokens.__getitem__)
        tokens[rank] += int(lengths[sample])
    return ranks


def evaluation_batches(lengths: Sequence[int] | np.ndarray, batch_size: int) -> list[list[int]]:
    """Return every sample index once, in batches of similar length, the longest first."""
    lengths = np.asarray(lengths)
    return _cut(np.arange(len(lengths)), lengths, batch_size)


def _cut(samples: np.ndarray, lengths: np.ndarray, size: int) -> list[list[int]]:
    by_length = samples[np.argsort(-lengths[samples], kind="stable")].tolist()
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]
