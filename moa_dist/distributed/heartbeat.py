"""Noticing that another rank is gone or stopped, and saying which.

A collective whose peer died hangs until a watchdog fires (NCCL) or fails without naming it (gloo).
So every rank keeps one connection to rank 0, the hub, on which both ends send a beat every few
seconds from a thread of their own: compiling, saving or a long step do not silence it. The system
closes the connection of a process that dies, so that is noticed at once; one that is stopped, or
whose host or network is gone, is noticed by its silence. The hub tells all others what it noticed
first. A rank that ends in order takes its leave, one that fails says why.

Messages are lines of JSON: `{}` is a beat, `{"hello": token, "rank": r, "host": h}` the first,
`{"bye": true}` a leave, `{"lost": message}` the end. Others may use the connections as well: what
they `tell`, between rank 0 and any other, travels as `{"news": ...}`.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moa_dist.distributed.network import host_name
from moa_dist.errors import ExitCode, PeerError

INTERVAL_S = 2.0
"""Seconds between beats."""
SILENCE_S = 20.0
"""A rank silent for longer is missing. Less than the 30 s after which launchers, which end a job
at its first dead rank, kill the others: they should have spoken by then."""
NOTICE_S = 5.0
"""Time between noticing in the background and ending a process whose training thread hangs; and
the time that a failing rank waits to learn whether another one failed first."""
_HELLO_S = 60.0
_MAX_LINE = 4096


@dataclass
class _Peer:
    """The other end of a connection."""

    name: str
    """Such as `rank 3 (host node-1)`; before its hello, its address."""
    heard: float
    """When something came last, in monotonic seconds."""
    known: bool = False
    """It has said hello with the right token."""
    received: bytes = b""
    """An unfinished line."""


class Heartbeat:
    """This rank's beat and its ear for the others. Thread-safe."""

    def __init__(
        self,
        rank: int,
        connections: dict[socket.socket, _Peer],
        listener: socket.socket | None,
        token: str,
        *,
        expected: set[int],
        silence_s: float,
    ) -> None:
        self.rank = rank
        self._token = token
        self._expected = expected
        self._silence_s = silence_s
        self._peers = connections
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        for connection in (*connections, *([listener] if listener else [])):
            self._selector.register(connection, selectors.EVENT_READ)
        self._leaving = threading.Event()
        self._noticed = threading.Event()
        self._handled = threading.Event()
        self._message = ""
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def lost(self, timeout_s: float = 0.0) -> str | None:
        """What was noticed first, such as `rank 1 (host a) is gone`; waits for it that long.

        Whoever gets an answer is expected to end the process, which is otherwise ended here.
        """
        if not self._noticed.wait(timeout_s):
            return None
        self._handled.set()
        return self._message

    def tell(self, news: dict[str, Any]) -> None:
        """To rank 0, or as rank 0 to all others. Short: a line of JSON."""
        for connection in list(self._peers):
            self._send(connection, {"news": news})

    def news(self) -> list[dict[str, Any]]:
        """What others told since the last call."""
        return [self._news.get() for _ in range(self._news.qsize())]

    def end_job(self, message: str) -> None:
        """End all ranks, this one included, as if one was lost; `message` says why."""
        self._notice(message)

    def close(self, failure: str | None = None) -> None:
        """Take leave in order, or tell the others why this rank fails."""
        if self._leaving.is_set():
            return
        self._leaving.set()
        self._handled.set()
        self._thread.join(timeout=2 * INTERVAL_S)
        farewell = {"bye": True} if failure is None else {"lost": failure}
        for connection in list(self._peers):
            self._send(connection, farewell)
            connection.close()
        if self._listener:
            self._listener.close()
        self._selector.close()

    def _run(self) -> None:
        next_beat = 0.0
        while not self._leaving.is_set():
            now = time.monotonic()
            if now >= next_beat:
                if next_beat and now - next_beat > self._silence_s / 2:
                    # This process itself was stopped or starved; what the others sent meanwhile
                    # is still to be read, so their silence proves nothing.
                    for peer in self._peers.values():
                        peer.heard = now
                for connection in list(self._peers):
                    self._send(connection, {})
                next_beat = now + INTERVAL_S
            for key, _ in self._selector.select(timeout=0.2):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._receive(key.fileobj)
            self._look_for_silence(time.monotonic())

    def _look_for_silence(self, now: float) -> None:
        for connection, peer in list(self._peers.items()):
            if now - peer.heard > self._silence_s:
                if peer.known:
                    seconds = f"{self._silence_s:g} s"
                    self._notice(f"{peer.name} has been silent for {seconds}: stopped, or cut off")
                self._forget(connection)
        if self._expected and now - self._started > _HELLO_S:
            ranks = ", ".join(map(str, sorted(self._expected)))
            self._notice(f"of rank {ranks} nothing was heard within {_HELLO_S:g} s")

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, address = self._listener.accept()
        except OSError:
            return
        connection.settimeout(INTERVAL_S)
        self._peers[connection] = _Peer(f"{address[0]}", time.monotonic())
        self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> None:
        peer = self._peers[connection]
        try:
            data = connection.recv(_MAX_LINE)
        except OSError:
            data = b""
        if not data:
            if peer.known:
                self._notice(f"{peer.name} is gone: its process ended without a word")
            self._forget(connection)
            return
        peer.heard = time.monotonic()
        *lines, peer.received = (peer.received + data).split(b"\n")
        for line in lines:
            if not self._understand(connection, peer, line):
                self._forget(connection)
                return
        if len(peer.received) > _MAX_LINE:
            self._forget(connection)

    def _understand(self, connection: socket.socket, peer: _Peer, line: bytes) -> bool:
        """Whether to go on listening."""
        try:
            message: dict[str, Any] = json.loads(line)
            if not peer.known:
                if not secrets.compare_digest(message["hello"], self._token):
                    return False
                peer.name = f"rank {int(message['rank'])} (host {message['host']})"
                peer.known = True
                self._expected.discard(int(message["rank"]))
            elif message.get("bye"):
                return False
            elif "lost" in message:
                self._notice(str(message["lost"]))
                return False
            elif "news" in message:
                self._news.put(dict(message["news"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    def _notice(self, message: str) -> None:
        """Remember the first, pass it on, and see to it that this process ends."""
        if self._noticed.is_set() or self._leaving.is_set():
            return
        self._message = message
        self._noticed.set()
        for connection in list(self._peers):
            self._send(connection, {"lost": message})
        threading.Thread(target=self._end_if_hanging, daemon=True).start()

    def _end_if_hanging(self) -> None:
        if not self._handled.wait(NOTICE_S):
            print(f"rank {self.rank}: {self._message}", file=sys.stderr, flush=True)
            os._exit(ExitCode.LOST_PEER)

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # the receiving side notices, and knows how the peer ended

    def _forget(self, connection: socket.socket) -> None:
        if self._peers.pop(connection, None) is not None:
            self._selector.unregister(connection)
            connection.close()


@contextmanager
def heartbeat(device: torch.device, *, silence_s: float = SILENCE_S) -> Iterator[Heartbeat | None]:
    """Watch over the ranks of this job while open; None for a job of one rank.

    Collective at the start: rank 0 tells the others where it listens.

    Raises:
        PeerError: instead of the error that a lost rank caused here.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        yield None
        return
    beat = _connect(rank, device, silence_s)
    try:
        yield beat
    except BaseException as error:
        # A collective fails here because of what happened elsewhere: wait for that news. Other
        # errors are this rank's own, or all ranks have them.
        is_effect = isinstance(error, RuntimeError) and not isinstance(
            error, torch.OutOfMemoryError
        )
        lost = beat.lost(NOTICE_S) if is_effect else None
        if lost is None:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            beat.close(f"rank {rank} (host {host_name()}) failed: {reason}")
            if is_effect and "timed out" in str(error).lower():
                raise PeerError(
                    "a collective timed out though every rank is alive: one of them is stuck, or "
                    f"did not come to it ({reason})"
                ) from error
            raise
        beat.close()
        raise PeerError(f"{lost}; this rank ends") from error
    beat.close()


def _connect(rank: int, device: torch.device, silence_s: float) -> Heartbeat:
    """Collective. The hub listens on the address by which the job's ranks found rank 0."""
    host = os.environ["MASTER_ADDR"]
    where: list[Any] = [None]
    listener = None
    if rank == 0:
        listener = _listen(host)
        where = [(listener.getsockname()[1], secrets.token_hex(16), host_name())]
    dist.broadcast_object_list(where, device=device)
    port, token, hub_host = where[0]
    if rank == 0:
        others = set(range(1, dist.get_world_size()))
        return Heartbeat(rank, {}, listener, token, expected=others, silence_s=silence_s)
    try:
        connection = socket.create_connection((host, port), timeout=_HELLO_S)
    except OSError as error:
        raise PeerError(
            f"rank {rank} cannot reach rank 0 at {host}:{port}: {error}; the network must let all "
            "ports through between the nodes of a job"
        ) from error
    connection.settimeout(INTERVAL_S)
    hello = {"hello": token, "rank": rank, "host": host_name()}
    connection.sendall(json.dumps(hello).encode() + b"\n")
    hub = _Peer(f"rank 0 (host {hub_host})", time.monotonic(), known=True)
    return Heartbeat(rank, {connection: hub}, None, token, expected=set(), silence_s=silence_s)


def _listen(host: str) -> socket.socket:
    """On loopback if the job stays there; a name may mean loopback to rank 0's own host alone."""
    is_local = host in ("localhost", "127.0.0.1", "::1")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host if is_local else "", 0), family=family, backlog=4096)
    listener.setblocking(False)
    return listener
