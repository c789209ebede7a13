"""Zero-shot scores on several ranks are those of one process, to the last bit."""

import pytest

from tests.evaluate.test_scoring import REQUESTS, make_scorer


def score_on_this_rank(requests):
    calls = []
    scores = make_scorer(1).score(requests, lambda *call: calls.append(call))
    return scores, calls


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_change_nothing(pools, world_size):
    expected, calls = score_on_this_rank(REQUESTS)
    assert len(calls) > world_size, "no rank has two batches"
    for scores, _ in pools(world_size).run(score_on_this_rank, REQUESTS):
        assert scores == expected


def test_fewer_batches_than_ranks(pools):
    expected, _ = score_on_this_rank(REQUESTS[:1])
    for scores, _ in pools(2).run(score_on_this_rank, REQUESTS[:1]):
        assert scores == expected
