"""Every measure against numbers worked out by hand."""

from math import inf, log

import numpy as np
import pytest

from moa_dist.analyze.measures import (
    chance_overlap,
    depth_order,
    mutual_information,
    overlap,
    pair_information,
    pointwise_information,
    repeat_shares,
)

COUNTS = np.array([[3, 1], [0, 4]])


def test_pointwise_information():
    pmi = pointwise_information(COUNTS, np.array([0, 1]))
    # p(0, 0) = 3/8, p(0) = 4/8, p(expert 0) = 3/8
    assert pmi[0] == pytest.approx([log(2), log((1 / 8) / (4 / 8 * 5 / 8))])
    assert pmi[1] == pytest.approx([-inf, log((4 / 8) / (4 / 8 * 5 / 8))])


def test_rows_left_out_still_count_as_choices():
    assert pointwise_information(COUNTS, np.array([0]))[0, 0] == pytest.approx(log(2))


def test_mutual_information_is_the_mean_of_pmi():
    expected = 3 / 8 * log(2) + 1 / 8 * log(0.4) + 4 / 8 * log(1.6)
    assert mutual_information(COUNTS) == pytest.approx(expected)
    assert mutual_information(np.array([[2, 4], [3, 6]])) == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.zeros((2, 2), np.int64)) == 0


def test_repeats_of_an_expert():
    load = np.array([[0, 6, 2, 0], [8, 2, 2, 0]])
    shares = repeat_shares(load)
    assert shares[:, :3].tolist() == [[0, 0.75, 0.5], [1, 0.25, 0.5]]
    assert np.isnan(shares[:, 3]).all()
    assert depth_order(load).tolist() == [1, 2, 0, 3]
    assert depth_order(load[:1]).tolist() == [0, 1, 2, 3]


def test_overlap_and_what_chance_makes_of_it():
    common = np.array([[8, 6], [6, 8]])  # 4 tokens, 2 experts each
    assert overlap(common, 4, 2).tolist() == [[1, 0.75], [0.75, 1]]
    # Repeat 0 takes experts 0 and 1 always; repeat 1 takes each of four experts half the time.
    load = np.array([[4, 4, 0, 0], [2, 2, 2, 2]])
    assert chance_overlap(load, 4, 2).tolist() == [[1, 0.5], [0.5, 0.5]]


def test_pairs():
    # Of 8 decisions 4 take expert 0, 4 take expert 1 and 3 take both; expert 2 is always alone.
    together = np.array([[4, 3, 0], [3, 4, 0], [0, 0, 2]])
    pmi = pair_information(together, 8)
    assert pmi[0, 1] == pmi[1, 0] == pytest.approx(log((3 / 8) / (4 / 8 * 4 / 8)))
    assert pmi[0, 2] == -inf
