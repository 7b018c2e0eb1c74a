"""The schedule of an epoch: mixtures, batches known without the ones before, shapes of batches."""

import chex
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.chat.tokenize import Example
from jaxtune.data.examples import SourceShare, in_memory
from jaxtune.data.loader import BatchSchedule
from jaxtune.data.packing import Layout, schedule_epoch


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.25, 0.3, 0.5, 1.0, 1.5, 2.0]), min_size=3, max_size=3),
    shuffle=st.booleans(),
)
def test_weights_of_a_mixture_are_passes(counts, weights, shuffle):
    """After e epochs each row of a source of weight w was seen e w times, rounded down or up,
    and none more often than another by two.
    """
    parts = [SourceShare(count, weight) for count, weight in zip(counts, weights, strict=False)]
    lengths, seen = np.full(sum(counts), 3), np.zeros(sum(counts), int)
    for epoch in range(8):
        epoch_rows = schedule_epoch(lengths, Layout(2, 8, True, shuffle, 5), epoch, parts)
        np.add.at(seen, epoch_rows.members, 1)
        start = 0
        for part in parts:
            times = seen[start : start + part.count]
            assert times.sum() == np.ceil(part.weight * part.count * (epoch + 1))
            assert times.max() - times.min() <= 1
            start += part.count


def test_each_pass_over_a_part_of_a_mixture_is_in_another_order():
    parts, lengths = [SourceShare(40, 0.5), SourceShare(3, 1.0)], np.full(43, 3)
    halves = [
        schedule_epoch(lengths, Layout(2, 8, False, False, 5), epoch, parts).members
        for epoch in range(4)
    ]
    shown = [set(half[half < 40].tolist()) for half in halves]
    assert shown[0] | shown[1] == shown[2] | shown[3] == set(range(40))
    assert shown[0] not in (shown[2], shown[3])
    other = schedule_epoch(lengths, Layout(2, 8, False, False, 6), 0, parts).members
    assert set(other.tolist()) != set(halves[0].tolist())


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    packing=st.booleans(),
    shuffle=st.booleans(),
    rows=st.integers(1, 3),
    data=st.data(),
)
def test_any_batch_is_known_without_the_ones_before(lengths, packing, shuffle, rows, data):
    def schedule():
        items = [
            Example(np.full(size + 1, number, np.int32), np.arange(size + 1) > 0)
            for number, size in enumerate(lengths)
        ]
        return BatchSchedule(in_memory(items), Layout(rows, 32, packing, shuffle, 2), epochs=3)

    whole = schedule()
    in_order = [whole.batch(index) for index in range(len(whole))]
    start = data.draw(st.integers(0, len(in_order) - 1))
    resumed = schedule()
    for index in range(start, len(in_order)):
        chex.assert_trees_all_equal(resumed.batch(index), in_order[index])
        assert resumed.epoch(index) == whole.epoch(index)


def test_unpacked_batches_hold_rows_of_like_length_and_few_shapes():
    random = np.random.default_rng(0)
    items = [
        Example(np.zeros(size + 1, np.int32), np.arange(size + 1) > 0)
        for size in random.integers(1, 500, 2000)
    ]
    schedule = BatchSchedule(
        in_memory(items), Layout(8, 512, packing=False, shuffle=True, seed=0), epochs=1
    )
    assert schedule.efficiency() > 0.8  # in random batches it would be a half
    assert len({schedule.shape(index) for index in range(len(schedule))}) <= 11
    assert schedule.shape(0) != schedule.shape(1) or schedule.shape(1) != schedule.shape(
        2
    )  # short and long come mixed
    packed = BatchSchedule(
        in_memory(items), Layout(8, 512, packing=True, shuffle=True, seed=0), epochs=1
    )
    assert packed.efficiency() > 0.97
