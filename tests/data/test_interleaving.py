"""Sources are mixed exactly by weight, and each continues where it was, however weights change."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_dist.config.data import DataConfig
from moa_dist.data.interleaving import Interleaving
from moa_dist.data.mixture import (
    Mixture,
    Stage,
    configured_stages,
    continue_stages,
    read_stages,
    stages_as_json,
)

BOOKS = {"books": 0.7, "debian": 0.3}


def mixture(readers: int = 8, **later: dict[str, float]) -> Mixture:
    stages = [Stage(0, BOOKS), *(Stage(int(since[1:]), w) for since, w in later.items())]
    return Mixture(tuple(stages), readers)


def test_golden_order() -> None:
    """Recorded once; a change here changes runs that people resume."""
    sources = "".join(mixture(4).locate(sample)[0][0] for sample in range(40))
    assert sources == "dbbdbdbbbbdbdbbbbdbdbbbbdbdbbbbdbdbbbbdb"


@pytest.mark.parametrize("readers", [1, 2, 8, 48, 64, 512])
@pytest.mark.parametrize(
    "weights", [(0.7, 0.3), (5, 3, 2), (100, 20, 5, 3, 1), (0.001, 0.999), (1,) * 6]
)
def test_shares_are_exact_to_a_few_samples_after_any_number(
    readers: int, weights: tuple[float, ...]
) -> None:
    by_name = {str(number): float(weight) for number, weight in enumerate(weights)}
    mixed = Mixture((Stage(0, by_name),), readers)
    worst = 0.0
    for samples in [10_000, 12_345, 10**6 + 7, 10**12 + 1]:
        counts = mixed.counts(samples)
        assert sum(counts.values()) == samples
        worst = max(
            worst,
            *(abs(counts[name] - samples * w / sum(weights)) for name, w in by_name.items()),
        )
    assert worst < 2 + readers**0.5  # with 64 readers 0.1 % of 10,000


def test_counts_are_those_of_the_samples() -> None:
    mixed = mixture(8, s100={"books": 0.1, "debian": 0.2, "web": 0.7}, s203={"web": 1.0})
    seen: Counter[str] = Counter()
    for sample in range(400):
        assert +Counter(mixed.counts(sample)) == seen
        seen[mixed.locate(sample)[0]] += 1
    assert mixed.locate(207)[0] != "web" or mixed.locate(206)[0] != "web"
    assert {mixed.locate(sample)[0] for sample in range(208, 400)} == {"web"}


@settings(max_examples=50, deadline=None)
@given(
    readers=st.sampled_from([1, 2, 4, 6, 16]),
    changes=st.lists(
        st.tuples(
            st.integers(0, 400),
            st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.25, 0.7, 3.0]), min_size=1),
        ),
        max_size=4,
    ),
)
def test_no_history_of_weights_skips_or_repeats_a_sample(
    readers: int, changes: list[tuple[int, dict[str, float]]]
) -> None:
    stages: tuple[Stage, ...] = (Stage(0, {"a": 0.6, "b": 0.4}),)
    for since, weights in sorted(changes, key=lambda change: change[0]):
        longer = continue_stages(stages, since, (Stage(0, weights),))
        # What was consumed before the change stays what it was.
        before, after = Mixture(stages, readers), Mixture(longer, readers)
        assert [after.locate(g) for g in range(since)] == [before.locate(g) for g in range(since)]
        stages = longer
    mixed = Mixture(stages, readers)
    consumed: dict[str, list[int]] = {}
    samples = 600 // readers * readers
    for sample in range(samples):
        name, index = mixed.locate(sample)
        assert index % readers == sample % readers  # so a rank keeps to its own shards
        consumed.setdefault(name, []).append(index)
    for name, indices in consumed.items():
        assert len(set(indices)) == len(indices)
        for reader in range(readers):  # in order and without gaps
            own = [index // readers for index in indices if index % readers == reader]
            assert own == list(range(len(own)))
        unread = min(set(range(len(indices) + 5 * readers)) - set(indices))
        assert mixed.first_unread(samples)[name] == unread


def test_samples_do_not_depend_on_where_one_begins() -> None:
    mixed = mixture(8, s333={"books": 0.5, "debian": 0.5})
    order = [mixed.locate(sample) for sample in range(1000)]
    places = random.Random(0).sample(range(1000), 200)
    fresh = mixture(8, s333={"books": 0.5, "debian": 0.5})
    assert [fresh.locate(place) for place in places] == [order[place] for place in places]


@pytest.mark.parametrize("readers", [8, 64])
def test_every_reader_and_every_few_samples_hold_the_shares(readers: int) -> None:
    mixed = mixture(readers)
    sources = [mixed.locate(sample)[0] for sample in range(100 * readers)]
    for reader in range(readers):
        assert abs(sources[reader::readers].count("books") - 70) <= 1
    for first in range(0, len(sources), 20):
        assert abs(sources[first : first + 20].count("books") - 14) <= 3


def test_weights_may_be_any_numbers() -> None:
    counts = Mixture((Stage(0, {"a": 70.0, "b": 3e1}),), 8).counts(999)
    assert counts == {"a": mixture(8).counts(999)["books"], "b": mixture(8).counts(999)["debian"]}
    assert Interleaving({"a": 0.0, "b": 1e-12}).locate(0, 5) == ("b", 5)


def test_stages_of_a_configuration_and_of_a_run_that_continues() -> None:
    sources = [
        {"path": "data/books/train", "weight": 0.7, "later_weights": [[500, 0.2]]},
        {"path": "data/debian/train", "weight": 0.3, "later_weights": [[500, 0.8], [900, 0]]},
    ]
    configured = configured_stages(DataConfig(train=sources, sequence_length=8))
    assert configured == (
        Stage(0, BOOKS),
        Stage(500, {"books": 0.2, "debian": 0.8}),
        Stage(900, {"books": 0.2, "debian": 0.0}),
    )
    assert read_stages(stages_as_json(configured)) == configured
    for sample in (0, 1, 499, 500, 501, 900, 5000):
        assert continue_stages(configured, sample, configured) == configured
    other = (Stage(0, {"web": 1.0}),)
    assert continue_stages(configured, 600, other) == (*configured[:2], Stage(600, {"web": 1.0}))
    assert continue_stages((), 600, other) == other
    one = configured_stages(DataConfig(train="somewhere", sequence_length=8))
    assert one == (Stage(0, {"train": 1.0}),)
    assert [Mixture(one, 4).locate(sample) for sample in range(99)] == [
        ("train", sample) for sample in range(99)
    ]
