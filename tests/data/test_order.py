"""The order of samples is a pure function, complete in every epoch and fixed for ever."""

from __future__ import annotations

from collections import Counter

import pytest

from moa_dist.data.order import SampleOrder, seeded_permutation

ORDER = SampleOrder(seed=3, num_shards=8, samples_per_shard=6, readers=4)
EPOCH = 8 * 6


def locations(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int]]:
    return [order.sample_location(sample) for sample in range(start, stop)]


def test_locations_do_not_depend_on_what_was_asked_before() -> None:
    forwards = locations(ORDER, 0, 3 * EPOCH)
    again = SampleOrder(seed=3, num_shards=8, samples_per_shard=6, readers=4)
    backwards = [again.sample_location(sample) for sample in reversed(range(3 * EPOCH))]
    assert forwards == backwards[::-1]


def test_every_sample_once_per_epoch_and_epochs_differ() -> None:
    epochs = [locations(ORDER, e * EPOCH, (e + 1) * EPOCH) for e in range(3)]
    everything = {(shard, row) for shard in range(8) for row in range(6)}
    assert all(set(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_each_epoch_has_an_order_of_shards_of_its_own() -> None:
    order = SampleOrder(seed=3, num_shards=32, samples_per_shard=6, readers=4)
    epochs = [tuple(order.shard_at(32 * epoch + i) for i in range(32)) for epoch in range(5)]
    assert len(set(epochs)) == 5


def test_each_visit_of_a_shard_takes_its_rows_in_an_order_of_its_own() -> None:
    order = SampleOrder(seed=3, num_shards=1, samples_per_shard=32, readers=1)
    assert len({tuple(order.rows_at(position)) for position in range(5)}) == 5


@pytest.mark.parametrize(("num_shards", "readers"), [(3, 4), (1, 4), (5, 2), (7, 1)])
def test_every_sample_equally_often_when_readers_do_not_divide_shards(
    num_shards: int, readers: int
) -> None:
    order = SampleOrder(seed=0, num_shards=num_shards, samples_per_shard=5, readers=readers)
    counts = Counter(locations(order, 0, num_shards * readers * 5))
    assert set(counts.values()) == {readers}
    assert len(counts) == num_shards * 5


def test_a_rank_needs_only_the_shards_of_its_own_readers() -> None:
    window = 4 * 6
    for rank in range(2):
        shards = {ORDER.sample_location(g)[0] for g in range(window) if g % 2 == rank}
        others = {ORDER.sample_location(g)[0] for g in range(window) if g % 2 != rank}
        assert len(shards) == 2
        assert not shards & others


def test_seed_changes_shards_and_rows() -> None:
    other = SampleOrder(seed=4, num_shards=8, samples_per_shard=6, readers=4)
    assert [other.shard_at(p) for p in range(8)] != [ORDER.shard_at(p) for p in range(8)]
    assert [other.rows_at(p).tolist() for p in range(4)] != [
        ORDER.rows_at(p).tolist() for p in range(4)
    ]


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    # Recorded once: a change here would silently reorder every run that is resumed.
    assert seeded_permutation(8, 0, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert locations(ORDER, 0, 4) == [(0, 0), (4, 3), (7, 2), (1, 5)]
    assert ORDER.sample_location(1_000_000) == (0, 1)
