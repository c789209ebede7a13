"""Connections to a job's port by someone who does not know its secret: nothing changes."""

import hmac
import json
import resource
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from moa_dist.errors import ClusterError
from moa_dist.launch import hub as module
from moa_dist.launch.handshake import SECRET_VARIABLE, WrongJobError, derive_key, take_secret
from moa_dist.launch.hub import MAX_CANDIDATES, Hub
from moa_dist.launch.link import Link, connect

WAIT_S = 20.0
SECRET, FOLDER = "s" * 16, Path("runs/x")
KEY = derive_key(SECRET, FOLDER)


class Job:
    """A hub with one node, and what it reports."""

    def __init__(self) -> None:
        self.reports: list[str] = []
        self.hub = Hub("127.0.0.1", 0, KEY, self.reports.append)
        self.node = self.join(1)
        until(lambda: 1 in self.hub.links)
        self.link = self.hub.links[1]

    def join(self, node: int, key: bytes = KEY) -> Link:
        return connect("127.0.0.1", self.hub.port, key, {"node": node}, WAIT_S)

    def dial(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.hub.port), timeout=WAIT_S)
        connection.settimeout(WAIT_S)
        return connection

    def assert_undisturbed(self) -> None:
        """The node holds its place, hears of nothing, and its messages arrive."""
        assert self.hub.links == {1: self.link}
        assert self.link.lost is None
        assert self.link.receive(0.0) is None
        assert self.node.receive(0.0) is None
        self.node.send({"answer": 1})
        assert self.link.receive(WAIT_S) == {"answer": 1}


@pytest.fixture
def job():
    job = Job()
    yield job
    job.hub.close()
    job.node.close()


def until(happens) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_closed(connection: socket.socket) -> bool:
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize(
    "key", [derive_key("t" * 16, FOLDER), derive_key(SECRET, Path("runs/y")), b""]
)
def test_wrong_secret_or_folder_is_refused_and_reported_once(job, key):
    for _ in range(3):
        with pytest.raises(WrongJobError, match=SECRET_VARIABLE):
            job.join(1, key)
    job.assert_undisturbed()
    assert len(job.reports) == 1
    assert "127.0.0.1" in job.reports[0]


def test_replayed_hello_is_refused(job):
    with socket.create_server(("127.0.0.1", 0)) as proxy, ExitStack() as stack:
        seen: list[bytes] = []

        def relay() -> None:
            theirs, _ = proxy.accept()
            ours = job.dial()
            stack.callback(theirs.close)
            stack.callback(ours.close)
            theirs.sendall(ours.recv(4096))
            seen.append(theirs.recv(4096))
            ours.sendall(seen[0])
            seen.append(ours.recv(4096))
            theirs.sendall(seen[1])

        thread = threading.Thread(target=relay)
        thread.start()
        connect("127.0.0.1", proxy.getsockname()[1], KEY, {"node": 2}, WAIT_S)
        thread.join(WAIT_S)
    until(lambda: 2 in job.hub.links)
    until(lambda: job.hub.links[2].lost is not None)
    del job.hub.links[2]
    assert SECRET.encode() not in b"".join(seen)
    assert KEY.hex().encode() not in b"".join(seen)
    with job.dial() as replay:
        replay.recv(4096)
        replay.sendall(seen[0])
        assert is_closed(replay)
    job.assert_undisturbed()
    assert len(job.reports) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\xff" * 100,
        b"[" * 4000 + b"\n",
        b'{"hello": {"node": 1}, "proof": ' + b"[" * 900 + b"]" * 900 + b"}\n",
        b'{"hello": ' + b"[" * 900 + b"]" * 900 + b', "proof": "x"}\n',
        b'{"hello": {"node": 1}, "nonce": null, "proof": "\\ud800"}\n',
        b'{"preempt": true}\n',
        b"{}\n",
        b"\n",
        b"x" * 10**6,
    ],
)
def test_garbage_is_refused_and_reported_once(job, data, monkeypatch):
    monkeypatch.setattr(module, "_HELLO_S", 0.5)
    for _ in range(3):
        with job.dial() as stranger:
            try:
                stranger.sendall(data)
            except ConnectionError:
                continue
            assert is_closed(stranger)
    job.assert_undisturbed()
    assert len(job.reports) == 1


def test_hello_of_a_node_that_has_no_number_is_refused(job):
    with pytest.raises(WrongJobError):
        connect("127.0.0.1", job.hub.port, KEY, {"node": "1"}, WAIT_S)
    job.assert_undisturbed()


def test_half_open_connection_is_dropped_after_a_while(job, monkeypatch):
    monkeypatch.setattr(module, "_HELLO_S", 0.5)
    with job.dial() as silent, job.dial() as slow:
        slow.sendall(b'{"hello"')
        assert is_closed(silent)
        assert is_closed(slow)
    job.assert_undisturbed()
    assert len(job.reports) == 1


def test_thousand_strangers_use_bounded_resources_while_nodes_connect(job):
    """They are half-open: none sends anything, and none leaves."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    process = psutil.Process()
    threads = process.num_threads()
    with ExitStack() as stack:
        strangers = [stack.enter_context(job.dial()) for _ in range(1000)]
        assert len(job.hub._candidates) <= MAX_CANDIDATES
        assert process.num_threads() == threads
        second = job.join(2)
        until(lambda: 2 in job.hub.links)
        del job.hub.links[2]
        second.close()
        until(lambda: process.num_threads() <= threads)  # those of the second node have ended
        for stranger in strangers[:500]:
            assert is_closed(stranger)
        job.assert_undisturbed()
    assert len(job.reports) == 1


def test_hub_that_does_not_know_the_secret_gets_no_node():
    """Whoever listens in node 0's place learns nothing that it could use."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen: list[bytes] = []

        def impostor() -> None:
            connection, _ = listener.accept()
            connection.sendall(b'{"challenge": "x"}\n')
            seen.append(connection.recv(4096))
            answer = json.loads(seen[0])
            forged = hmac.new(b"guess", answer["nonce"].encode(), "sha256").hexdigest()
            connection.sendall(json.dumps({"proof": forged}).encode() + b"\n")
            connection.sendall(b'{"exit": 0}\n')
            connection.close()

        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(WrongJobError):
            connect("127.0.0.1", listener.getsockname()[1], KEY, {"node": 1}, WAIT_S)
        thread.join(WAIT_S)
    assert SECRET.encode() not in seen[0]


@pytest.mark.parametrize("given", [None, "", "short"])
def test_secret_must_be_given(given):
    environment = {} if given is None else {SECRET_VARIABLE: given}
    with pytest.raises(ClusterError, match=SECRET_VARIABLE):
        take_secret(environment)


def test_secret_is_not_passed_on():
    environment = {SECRET_VARIABLE: SECRET, "HOME": "/"}
    assert take_secret(environment) == SECRET
    assert environment == {"HOME": "/"}
