"""What counts as waiting, by a clock that only collectives move."""

from types import SimpleNamespace

import pytest

from moa_dist.distributed import waiting
from moa_dist.distributed.traffic import Flow
from moa_dist.distributed.waiting import Waits, described
from moa_dist.train import pace
from moa_dist.train.metrics import Timing
from moa_dist.train.pace import Pace

DISPATCH = Flow("stack.layers.3.ffn", "dispatch", False)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    for module in (waiting, pace):
        monkeypatch.setattr(module.time, "monotonic", lambda: now.time)
    return now


def test_both_parts_of_a_collective_wait_and_it_counts_once(clock):
    waits = Waits()
    with waits.begin(DISPATCH):
        clock.time += 1
    clock.time += 10  # computation beside it
    with waits.wait(DISPATCH):
        clock.time += 2
        assert waits.progress == (1, DISPATCH, True, 111.0)
    assert waits.progress == (1, DISPATCH, False, 113.0)
    assert waits.take() == 3
    assert waits.take() == 0
    assert described(DISPATCH) == "dispatch of stack.layers.3.ffn, forward"


def test_a_lap_leaves_out_pauses_and_what_was_waited_for_in_them(clock):
    waits = Waits()
    with waits.begin("before the first step"):
        clock.time += 7
    measured = Pace(20, waits)
    with waits.begin(DISPATCH):
        clock.time += 1
    with measured.paused(), waits.begin("of a validation"):
        clock.time += 50
    clock.time += 3
    with waits.begin(DISPATCH):
        clock.time += 2
    assert measured.lap(22) == (2, 6.0, 3.0)
    clock.time += 4
    assert measured.lap(23) == (1, 4.0, 0.0)


def test_the_slowest_rank_works_most_and_waits_least():
    timing = Timing.of([0.1, 0.4, 0.2], [0.3, 0.0, 0.2], ["a", "a", "b"])
    assert (timing.slowest.rank, timing.slowest.host, timing.slowest.seconds) == (1, "a", 0.4)
    assert (timing.fastest.rank, timing.fastest.seconds) == (0, 0.1)
    assert timing.step_seconds == pytest.approx(0.4)
    assert timing.communication_share == pytest.approx(0.5 / 1.2)
