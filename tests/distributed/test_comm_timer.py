"""What counts as waiting, by a clock that only collectives move."""

from types import SimpleNamespace

import pytest

from moa_dist.distributed import comm_timer as comm_timer_module
from moa_dist.distributed.comm_timer import CommTimer, described
from moa_dist.distributed.traffic import TrafficKey
from moa_dist.observe.metrics import Timing
from moa_dist.train import step_timer as step_timer_module
from moa_dist.train.step_timer import StepTimer

DISPATCH = TrafficKey("stack.layers.3.ffn", "dispatch", False)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    for module in (comm_timer_module, step_timer_module):
        monkeypatch.setattr(module.time, "monotonic", lambda: now.time)
    return now


def test_both_parts_of_a_collective_wait_and_it_counts_once(clock):
    comm_timer = CommTimer()
    with comm_timer.begin(DISPATCH):
        clock.time += 1
    clock.time += 10  # computation beside it
    with comm_timer.wait(DISPATCH):
        clock.time += 2
        assert comm_timer.progress == (1, DISPATCH, True, 111.0)
    assert comm_timer.progress == (1, DISPATCH, False, 113.0)
    assert comm_timer.take() == 3
    assert comm_timer.take() == 0
    assert described(DISPATCH) == "dispatch of stack.layers.3.ffn, forward"


def test_a_lap_leaves_out_pauses_and_what_was_waited_for_in_them(clock):
    comm_timer = CommTimer()
    with comm_timer.begin("before the first step"):
        clock.time += 7
    measured = StepTimer(20, comm_timer)
    with comm_timer.begin(DISPATCH):
        clock.time += 1
    with measured.paused(), comm_timer.begin("of a validation"):
        clock.time += 50
    clock.time += 3
    with comm_timer.begin(DISPATCH):
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
