"""Tells the user which conversations became several samples, and why."""

import numpy as np

from llmforge.data.dataset import PreparedData
from llmforge.data.shards import open_cached
from llmforge.prompt import Encoder
from llmforge.prompt.conversation import common_prefix_length


def describe_unrolled(rows: PreparedData, encoder: Encoder) -> str | None:
    """Say how many conversations are trained as how many samples, with the first one's reason; None if none is."""
    samples_of_row = np.bincount(rows.sample_row, minlength=len(rows.row_line))
    unrolled = np.flatnonzero(samples_of_row > 1)
    if not len(unrolled):
        return None
    first = int(unrolled[0])
    file, line = rows.place(first)
    start = int(np.searchsorted(rows.sample_row, first))
    before, after = (_text(rows, sample, encoder) for sample in (start, start + 1))
    return (
        f"{len(unrolled):,} of {len(rows.row_line):,} conversations are trained as {samples_of_row[unrolled].sum():,} "
        f"samples, because {_reason(before, after)} ({file}:{line}). Each sample begins with the prompt that a server "
        "would be given for its answer"
    )


def _text(rows: PreparedData, sample: int, encoder: Encoder) -> str:
    shard = open_cached(rows.shards[rows.sample_shard[sample]])
    return encoder.decode(shard.sample(int(rows.sample_index[sample]), int(rows.lengths[sample])).input_ids)


def _reason(before: str, after: str) -> str:
    """Tell from the texts of two samples why the second is not the first one, continued."""
    if after.startswith(before):
        return "tokens at the boundary of a turn merge with what follows"
    place = max(0, common_prefix_length(before, after) - 10)
    return (
        "the chat template writes earlier turns differently once a conversation goes on: "
        f"{before[place : place + 50]!r} becomes {after[place : place + 50]!r}"
    )
