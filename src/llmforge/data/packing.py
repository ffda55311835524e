"""Lays samples into one row without padding, with what several of them begin with held once.

The row is a forest. Each node is a run of tokens; a sample is the path from a root to the node where it ends, and a
token sees the tokens of its own path before it, nothing else. Nodes lie in depth-first order, so a node's descendants
follow it without a gap, and attention to an ancestor is one rectangle (`models/packed_attention.py`).

This module deals in token ids and weights; it knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llmforge.data.samples import Sample

# A shared node costs a few more attention calls in each layer; below this many tokens saved it does not pay.
SHORTEST_SHARED = 16
LEAST_SAVED = 64


@dataclass(frozen=True)
class Pack:
    """Samples in one row of N tokens, K nodes and S targets.

    A node is the tokens `starts` … `ends`, its descendants are the tokens `ends` … `stops`, its parent is a node's
    number or -1. Target s is the token that the place `places[s]` has to predict, and counts `weights[s]`: a token that
    several samples share counts once for each of them. `tokens` and `trained_tokens` are the samples' own, so they
    count what is shared as often as it occurs.
    """

    input_ids: np.ndarray  # int64 [N]
    position_ids: np.ndarray  # int64 [N], within the sample
    starts: np.ndarray  # int64 [K]
    ends: np.ndarray  # int64 [K]
    stops: np.ndarray  # int64 [K]
    parents: np.ndarray  # int64 [K]
    places: np.ndarray  # int64 [S]
    targets: np.ndarray  # int64 [S]
    weights: np.ndarray  # float32 [S]
    weight: float
    examples: int
    tokens: int
    trained_tokens: int


def pack(samples: Sequence[Sample], *, share: bool, fill_to: int = 1, fill_with: int = 0) -> Pack:
    """Lay samples into one row.

    Args:
        share: hold what samples begin with once, where that pays.
        fill_to: round the row's length up to a multiple of this, with a node of its own that has no targets: a new
            length costs time where kernels are made for each.
        fill_with: the token to fill with.
    """
    ids = [np.asarray(sample.input_ids, dtype=np.int64) for sample in samples]
    weights = [np.asarray(sample.loss_weights, dtype=np.float64) for sample in samples]
    order = _sorted(ids) if share else list(range(len(ids)))
    common = _common_with_next(ids, order) if share else [0] * len(order)

    row: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    starts: list[int] = []
    ends: list[int] = []
    parents: list[int] = []
    length = 0
    # Samples order[first:last] agree on their first `depth` tokens, which node `parent` and its ancestors hold.
    waiting = [(0, len(order), 0, -1)]
    while waiting:
        first, last, depth, parent = waiting.pop()
        members = [index for index in order[first:last] if len(ids[index]) > depth]
        first = last - len(members)  # those that end here sort before those that go on
        if not members:
            continue
        agreed = min(common[first : last - 1]) if len(members) > 1 else len(ids[members[0]])
        if len(members) > 1 and not _pays(agreed - depth, len(members)):
            waiting += reversed(_parted(first, last, depth, parent, common, agreed))
            continue
        starts.append(length)
        parents.append(parent)
        row.append(ids[members[0]][depth:agreed])
        positions.append(np.arange(depth, agreed))
        counted.append(np.sum([weights[index][depth:agreed] for index in members], axis=0))
        length += agreed - depth
        ends.append(length)
        if len(members) > 1:
            waiting.append((first, last, agreed, len(starts) - 1))
    filling = -length % fill_to
    if filling:
        starts.append(length)
        parents.append(-1)
        row.append(np.full(filling, fill_with, dtype=np.int64))
        positions.append(np.arange(filling))
        counted.append(np.zeros(filling))
        ends.append(length + filling)

    stops = list(ends)
    for node in reversed(range(len(starts))):
        if parents[node] >= 0:
            stops[parents[node]] = max(stops[parents[node]], stops[node])
    input_ids, weight_of = np.concatenate(row), np.concatenate(counted)
    before = np.arange(-1, len(input_ids) - 1)
    for start, parent in zip(starts, parents, strict=True):
        before[start] = ends[parent] - 1 if parent >= 0 else -1
    targets = np.flatnonzero((weight_of > 0) & (before >= 0))
    return Pack(
        input_ids=input_ids,
        position_ids=np.concatenate(positions),
        starts=np.array(starts),
        ends=np.array(ends),
        stops=np.array(stops),
        parents=np.array(parents),
        places=before[targets],
        targets=input_ids[targets],
        weights=weight_of[targets].astype(np.float32),
        weight=float(sum(w.sum() for w in weights)),
        examples=len(samples),
        tokens=sum(map(len, ids)),
        trained_tokens=int(sum((w > 0).sum() for w in weights)),
    )


def cut_into_packs(samples: Sequence[Sample], *, share: bool, wanted: int, limit: int) -> list[list[Sample]]:
    """Cut the samples of a step into packs of about `wanted` tokens, best fit first, the largest pack first.

    Samples that share most of themselves stay together up to `limit` tokens, because every pack they are cut into
    computes it again. A sample longer than that is a pack of its own.
    """
    ids = [np.asarray(sample.input_ids, dtype=np.int64) for sample in samples]
    groups: list[list[int]] = []
    sizes: list[int] = []
    if share:
        order = _sorted(ids)
        common = _common_with_next(ids, order)
        previous = 0  # tokens that a sample shares with the one before it
        for place, index in enumerate(order):
            own = len(ids[index]) - previous
            room = max(limit, wanted) if previous >= own else wanted
            if previous and sizes[-1] + own <= room:
                groups[-1].append(index)
                sizes[-1] += own
            else:
                groups.append([index])
                sizes.append(len(ids[index]))
            previous = common[place] if common[place] >= SHORTEST_SHARED else 0
    else:
        groups, sizes = [[index] for index in range(len(ids))], [len(row) for row in ids]
    packs: list[list[int]] = []
    rooms: list[int] = []
    for number in sorted(range(len(groups)), key=lambda n: -sizes[n]):
        fitting = [place for place, room in enumerate(rooms) if room >= sizes[number]]
        if fitting:
            best = min(fitting, key=rooms.__getitem__)
            packs[best] += groups[number]
            rooms[best] -= sizes[number]
        else:
            packs.append(list(groups[number]))
            rooms.append(wanted - sizes[number])
    return [
        [samples[index] for index in pack] for _, pack in sorted(zip(rooms, packs, strict=True), key=lambda p: p[0])
    ]


def _sorted(ids: Sequence[np.ndarray]) -> list[int]:
    """Order samples so that those with the longest common beginnings are neighbours; a beginning comes first."""
    keys = [row.astype(">u4").tobytes() for row in ids]
    return sorted(range(len(ids)), key=keys.__getitem__)


def _common_with_next(ids: Sequence[np.ndarray], order: Sequence[int]) -> list[int]:
    """Count the tokens that each sample has in common with the next one in order, from the first; 0 for the last."""
    common = []
    for one, two in pairwise(order):
        shorter = min(len(ids[one]), len(ids[two]))
        different = np.flatnonzero(ids[one][:shorter] != ids[two][:shorter])
        common.append(int(different[0]) if len(different) else shorter)
    return [*common, 0]


def _pays(length: int, samples: int) -> bool:
    return length >= SHORTEST_SHARED and length * (samples - 1) >= LEAST_SAVED


def _parted(
    first: int, last: int, depth: int, parent: int, common: Sequence[int], agreed: int
) -> list[tuple[int, int, int, int]]:
    """Part samples where neighbours agree least; within each part they agree on more."""
    cuts = [place + 1 for place in range(first, last - 1) if common[place] == agreed]
    bounds = [first, *cuts, last]
    return [(start, end, depth, parent) for start, end in pairwise(bounds)]
