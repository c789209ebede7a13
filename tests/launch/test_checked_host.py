"""The process that answers for a host, as it is asked here and through ssh."""

import socket
import sys
import time

import pytest

from moa_dist.launch.checked_host import HostProcess, NoAnswerError


@pytest.fixture
def host():
    process = HostProcess()
    yield process
    process.close()


def test_it_holds_a_port_and_takes_another_if_that_is_held(host):
    assert abs(host.ask({"do": "clock"})["time"] - time.time()) < 60
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        request = {"do": "listen", "address": "127.0.0.1", "port": port}
        refused = host.ask({**request, "may_pick": False})
        assert refused["port"] is None
        assert str(port) in refused["problem"]
        picked = host.ask({**request, "may_pick": True})
    assert picked["port"] not in (None, port)
    way = host.ask({"do": "reach", "address": "127.0.0.1", "port": picked["port"]})
    assert way == {"interface": "lo", "problem": None}
    with socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
    way = host.ask({"do": "reach", "address": "127.0.0.1", "port": free})
    assert way["interface"] is None
    assert f"127.0.0.1:{free}" in way["problem"]


def test_failing_request_is_reported_and_later_ones_are_answered(host):
    with pytest.raises(NoAnswerError, match="KeyError") as error:
        host.ask({"do": "no such thing"})
    assert not error.value.unreachable
    assert "time" in host.ask({"do": "clock"})


def test_process_that_fails_reports_its_exit_status(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    process = HostProcess()
    with pytest.raises(NoAnswerError) as error:
        process.ask({"do": "clock"})
    assert (error.value.status, error.value.unreachable) == (1, False)
    process.close()
