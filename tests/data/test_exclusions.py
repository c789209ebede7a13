"""Damaged shards leave the order: a pure function still, and every other sample once per epoch."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_dist.data.order import Exclusion, SampleOrder, exclude

NUM_SHARDS, SAMPLES, READERS = 8, 6, 4
WINDOW = READERS * SAMPLES


def order(*exclusions: Exclusion) -> SampleOrder:
    return SampleOrder(3, NUM_SHARDS, SAMPLES, READERS, exclusions)


def locations(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int]]:
    return [order.sample_location(sample) for sample in range(start, stop)]


def shards_taken(order: SampleOrder, start: int, stop: int) -> Counter[int]:
    """Count the samples taken from each shard."""
    return Counter(shard for shard, _ in locations(order, start, stop))


@pytest.mark.parametrize("excluded", [(5,), (0, 1, 2, 7), (0, 1, 2, 3, 4, 5, 6)])
def test_every_other_sample_once_per_epoch(excluded: tuple[int, ...]) -> None:
    kept = NUM_SHARDS - len(excluded)
    without = order(Exclusion(0, excluded))
    # Of `kept` windows, which are READERS whole epochs of the shards that are left.
    counts = Counter(locations(without, 0, kept * WINDOW))
    assert set(counts.values()) == {READERS}
    assert {shard for shard, _ in counts} == set(range(NUM_SHARDS)) - set(excluded)
    for epoch in range(READERS):
        positions = range(epoch * kept, (epoch + 1) * kept)
        assert len({without.shard_at(position) for position in positions}) == kept


def test_the_rest_keeps_its_order() -> None:
    everything = [order().shard_at(position) for position in range(3 * NUM_SHARDS)]
    without = order(Exclusion(0, (2, 6)))
    kept = [shard for shard in everything if shard not in (2, 6)]
    assert [without.shard_at(position) for position in range(len(kept))] == kept


@pytest.mark.parametrize("at_window", [1, 2, 5])
def test_between_windows_a_change_loses_and_repeats_nothing(at_window: int) -> None:
    since = at_window * WINDOW
    changed = order(Exclusion(since, (2,)))
    assert locations(changed, 0, since) == locations(order(), 0, since)
    everything = [order().shard_at(p) for p in range(6 * NUM_SHARDS)]
    taken = everything[: at_window * READERS]
    taken += [shard for shard in everything[at_window * READERS :] if shard != 2]
    assert [changed.shard_at(p) for p in range(5 * NUM_SHARDS)] == taken[: 5 * NUM_SHARDS]


def test_in_a_window_open_shards_are_read_to_their_end_and_only_a_damaged_one_is_replaced() -> None:
    since, end = WINDOW + 9, 2 * WINDOW
    open_shards = [order().shard_at(p) for p in range(READERS, 2 * READERS)]
    damaged = open_shards[1]
    changed = order(Exclusion(since, (damaged,)))
    before, after = locations(order(), 0, end), locations(changed, 0, end)
    assert after[:since] == before[:since]
    replaced = [s for s in range(since, end) if before[s] != after[s]]
    assert replaced == [s for s in range(since, end) if before[s][0] == damaged]
    assert damaged not in shards_taken(changed, since, since + 5 * WINDOW)
    # The next window goes on exactly where it would have, without the damaged shard.
    following = [order().shard_at(p) for p in range(2 * READERS, 6 * READERS)]
    expected = [shard for shard in following if shard != damaged]
    positions = range(2 * READERS, 2 * READERS + len(expected))
    assert [changed.shard_at(p) for p in positions] == expected


def test_a_shard_that_is_whole_again_comes_back() -> None:
    history = (Exclusion(0, (2, 6)), Exclusion(3 * WINDOW, (6,)), Exclusion(5 * WINDOW, ()))
    back = order(*history)
    # 12 positions without two shards, 8 without one, and then all.
    assert 2 not in shards_taken(back, 0, 3 * WINDOW)
    assert 6 not in shards_taken(back, 0, 5 * WINDOW)
    later = shards_taken(back, 5 * WINDOW, 9 * WINDOW)
    assert set(later) == set(range(NUM_SHARDS))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 8 * WINDOW), st.sets(st.integers(0, 7), max_size=7)),
        max_size=4,
    )
)
def test_any_history_is_pure_and_never_gives_a_damaged_sample(
    stages: list[tuple[int, set[int]]],
) -> None:
    history: tuple[Exclusion, ...] = ()
    for since, shards in sorted(stages, key=lambda stage: stage[0]):
        longer = exclude(history, since, tuple(sorted(shards)))
        # What was consumed before the change stays what it was.
        assert locations(order(*longer), 0, since) == locations(order(*history), 0, since)
        history = longer
    stop = 10 * WINDOW
    taken = locations(order(*history), 0, stop)
    assert taken[::-1] == [order(*history).sample_location(s) for s in reversed(range(stop))]
    for sample, (shard, _) in enumerate(taken):
        current = [e.shards for e in history if e.since <= sample]
        assert not current or shard not in current[-1]
    # At positions, no shard comes more than one epoch ahead of another that was never excluded.
    never = set(range(NUM_SHARDS)) - {s for e in history for s in e.shards}
    times = Counter(order(*history).shard_at(p) for p in range(40))
    assert not never or max(times[s] for s in never) - min(times[s] for s in never) <= 1


def test_history_grows_only_by_changes() -> None:
    assert exclude((), 0, ()) == ()
    first = exclude((), 24, (3,))
    assert first == (Exclusion(24, (3,)),)
    assert exclude(first, 48, (3,)) == first
    assert exclude(first, 48, ()) == (*first, Exclusion(48, ()))
