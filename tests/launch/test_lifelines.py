"""An agent learns what to do with its rank: save, end at once, or save as an orphan."""

import time

import pytest

from moa_dist.launch.hub import Hub
from moa_dist.launch.rank import NetworkLifeline
from moa_dist.launch.record import Start

WAIT_S = 20.0
KEY = bytes(32)


@pytest.fixture
def hub():
    hub = Hub("127.0.0.1", 0, KEY)
    yield hub
    hub.close()


@pytest.fixture
def lifeline(hub, monkeypatch) -> NetworkLifeline:
    """The lifeline of an agent on node 1."""
    connection = "127.0.0.1 50000 127.0.0.1 22"
    given = {"LOCAL_RANK": "0", "CROSS_RANK": "1", "SSH_CONNECTION": connection}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    lifeline = NetworkLifeline(Start((), ".", {}, ("a", "b"), hub.port, KEY.hex()))
    deadline = time.monotonic() + WAIT_S
    while 1 not in hub.links:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return lifeline


@pytest.mark.parametrize("event", ["preempt", "end"])
def test_supervisor_asks(hub, lifeline, event):
    assert lifeline.poll(0.0) is None
    hub.links[1].send({event: True})
    assert lifeline.poll(WAIT_S) == event


def test_supervisor_ends(hub, lifeline):
    hub.close_links()
    assert lifeline.poll(WAIT_S) == "gone"


def test_host_is_cut_off(lifeline):
    """Another attempt may start on other hosts, so nothing may be saved any more."""
    assert lifeline._link is not None
    lifeline._link._silence_s = 0.5  # less than the time between heartbeats
    assert lifeline.poll(WAIT_S) == "end"
