"""Links between a supervisor and its nodes: messages arrive, and the end of either is noticed."""

import socket
import time
from pathlib import Path

import pytest

from moa_dist.errors import ExitCode
from moa_dist.launch.handshake import derive_key
from moa_dist.launch.hub import Hub
from moa_dist.launch.link import Link, LinkLostError, connect

WAIT_S = 20.0
KEY = derive_key("s" * 16, Path("runs/x"))


@pytest.fixture
def hub():
    hub = Hub("127.0.0.1", 0, KEY)
    yield hub
    hub.close()


def join(hub: Hub, node: int) -> Link:
    return connect("127.0.0.1", hub.port, KEY, {"node": node, "host": "b"}, WAIT_S)


def linked(hub: Hub, node: int, before: Link | None = None) -> Link:
    deadline = time.monotonic() + WAIT_S
    while hub.links.get(node) is before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return hub.links[node]


def test_messages_arrive_in_order_both_ways(hub):
    there = join(hub, 1)
    here = linked(hub, 1)
    assert here.hello["host"] == "b"
    for number in range(3):
        here.send({"number": number})
        there.send({"answer": "ä" * 10000, "to": number})
    assert [there.receive(WAIT_S) for _ in range(3)] == [{"number": n} for n in range(3)]
    assert [here.receive(WAIT_S)["to"] for _ in range(3)] == [0, 1, 2]
    assert here.receive(0.0) is None
    there.close()


def test_end_is_noticed_after_the_last_message_was_read(hub):
    there = join(hub, 1)
    here = linked(hub, 1)
    there.send({"last": True})
    there.close()
    assert here.receive(WAIT_S) == {"last": True}
    with pytest.raises(LinkLostError) as error:
        here.receive(WAIT_S)
    assert error.value.loss.reason == "gone"


def test_closing_the_links_ends_the_nodes(hub):
    there = join(hub, 0)
    linked(hub, 0)
    hub.close_links()
    with pytest.raises(LinkLostError):
        there.receive(WAIT_S)


def test_other_end_that_falls_silent_is_lost():
    listener = socket.create_server(("127.0.0.1", 0))
    ours = socket.create_connection(listener.getsockname())
    theirs, _ = listener.accept()  # sends nothing, as if the cable was cut
    link = Link(ours, silence_s=0.5)
    with pytest.raises(LinkLostError, match=r"\b0\.5 s") as error:
        link.receive(WAIT_S)
    assert error.value.loss.reason == "silent"
    link.close()
    theirs.close()
    listener.close()


def test_node_started_again_takes_its_place(hub):
    first = join(hub, 1)
    old = linked(hub, 1)
    second = join(hub, 1)
    assert linked(hub, 1, before=old) is not old
    message = first.receive(WAIT_S)
    assert message is not None
    assert message["exit"] == ExitCode.USER
    assert "node 1" in message["text"]
    first.close()
    second.close()
