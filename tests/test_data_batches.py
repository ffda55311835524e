"""The plan of steps: complete, repeatable, and the same examples per step however a step is split."""

from itertools import chain, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmforge.data.batches import StepPlan, evaluation_batches

lengths_lists = st.lists(st.integers(1, 500), min_size=1, max_size=60)


@given(
    lengths=lengths_lists, micro_batch=st.integers(1, 9), micro_batches=st.integers(1, 5), seed=st.integers(0, 2**31)
)
def test_every_sample_once_per_epoch(lengths, micro_batch, micro_batches, seed):
    plan = StepPlan(lengths, micro_batch, micro_batches, seed)
    for epoch in range(2):
        steps = [plan.micro_batches(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]
        assert sorted(chain.from_iterable(chain.from_iterable(steps))) == list(range(len(lengths)))
        for step in steps[:-1]:
            assert [len(batch) for batch in step] == [micro_batch] * micro_batches
        assert all(batch for step in steps for batch in step)


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60), seed=st.integers(0, 99), step=st.integers(0, 40))
def test_a_steps_examples_do_not_depend_on_the_split(lengths, seed, step):
    splits = [StepPlan(lengths, *split, seed=seed).micro_batches(step) for split in ((8, 1), (1, 8), (4, 2))]
    first, *others = [sorted(chain.from_iterable(split)) for split in splits]
    assert others == [first, first]


def test_a_plan_has_no_state():
    lengths = np.random.default_rng(0).integers(1, 500, 1000)
    forwards, resumed = StepPlan(lengths, 4, 2, seed=1), StepPlan(lengths, 4, 2, seed=1)
    whole = [forwards.micro_batches(step) for step in range(300)]
    assert [resumed.micro_batches(step) for step in range(200, 300)] == whole[200:]
    assert resumed.micro_batches(3) == whole[3]


def test_epochs_and_seeds_give_other_orders():
    def first_step(seed, step):
        return StepPlan(range(1, 101), 10, 1, seed).micro_batches(step)

    assert first_step(0, 0) != first_step(0, 10)
    assert first_step(0, 0) != first_step(1, 0)


def test_steps_per_epoch_counts_the_partial_step():
    assert [StepPlan([1] * count, 2, 4, 0).steps_per_epoch for count in (1, 8, 9, 16)] == [1, 1, 2, 2]
    assert [len(batch) for batch in StepPlan([1] * 5, 2, 4, 0).micro_batches(0)] == [2, 2, 1]


def test_samples_of_similar_length_share_a_micro_batch():
    lengths = np.random.default_rng(0).integers(1, 1000, 64)
    step = StepPlan(lengths, 8, 8, seed=0).micro_batches(0)
    ranges = [(lengths[batch].min(), lengths[batch].max()) for batch in step]
    assert all(shorter_max <= longer_min for (longer_min, _), (_, shorter_max) in pairwise(ranges))


@given(lengths=lengths_lists, size=st.integers(1, 9))
def test_evaluation_reads_every_sample_once_longest_first(lengths, size):
    batches = evaluation_batches(lengths, size)
    order = list(chain.from_iterable(batches))
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    assert all(len(batch) == size for batch in batches[:-1])


def test_the_order_is_this_one():
    """A change here changes every run's data order, and with it what a resumed run sees."""
    assert StepPlan([5, 3, 9, 1, 7, 2], 2, 1, seed=0).micro_batches(0) == [[2, 3]]
