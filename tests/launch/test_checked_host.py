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
        assert f"port {port} cannot be used" in refused["problem"]
        picked = host.ask({**request, "may_pick": True})
    assert picked["port"] not in (None, port)
    way = host.ask({"do": "reach", "address": "127.0.0.1", "port": picked["port"]})
    assert way == {"interface": "lo", "problem": None}
    with socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
    way = host.ask({"do": "reach", "address": "127.0.0.1", "port": free})
    assert f"cannot reach 127.0.0.1:{free}" in way["problem"]


def test_request_that_fails_is_told_and_others_are_answered(host):
    with pytest.raises(NoAnswerError, match="no such thing"):
        host.ask({"do": "no such thing"})
    assert "time" in host.ask({"do": "clock"})


def test_process_that_fails_says_how(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    process = HostProcess()
    with pytest.raises(NoAnswerError, match="exit status 1"):
        process.ask({"do": "clock"})
    process.close()
