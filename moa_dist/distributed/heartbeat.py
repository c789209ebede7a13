"""Detects that another rank is gone or stopped, and reports which one.

A collective whose peer died hangs until a watchdog fires (NCCL) or fails without naming the peer
(gloo). Every rank therefore keeps one connection to rank 0, the hub. Both ends send a heartbeat
every few seconds from a background thread, so compiling, saving or a long step do not interrupt
it. When a process dies the operating system closes its connection, which is noticed immediately; a
process that is stopped, or whose host or network is gone, is noticed by its silence. The hub
forwards the first failure to all others. A rank that exits normally says goodbye, and one that
fails says why. `moa_dist.distributed.peer` documents the messages.
"""

from __future__ import annotations

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
from typing import Any

import torch
import torch.distributed as dist

from moa_dist.distributed.network import host_name
from moa_dist.distributed.peer import BadMessageError, Failure, Message, Peer, parse
from moa_dist.errors import ExitCode, PeerError, PeerErrorKind

INTERVAL_S = 2.0
"""Seconds between heartbeats."""
SILENCE_S = 20.0
"""A rank that is silent for longer counts as lost. Less than the 30 s after which launchers, which
end a job at its first dead rank, kill the others, so that these can report the failure first."""
NOTICE_S = 5.0
"""Time between detecting a failure in the background and ending a process whose training thread
hangs; also the time that a failing rank waits to learn whether another one failed first."""
_HELLO_S = 60.0


class Heartbeat:
    """Sends heartbeats and monitors peers. Thread-safe."""

    def __init__(
        self,
        rank: int,
        peers: list[Peer],
        listener: socket.socket | None,
        token: str,
        *,
        expected: set[int],
        silence_s: float,
    ) -> None:
        """Start monitoring.

        Args:
            rank: This rank.
            peers: Open connections: to the hub, or none on the hub itself.
            listener: Where the hub accepts connections; None on other ranks.
            token: Identifies the ranks of this job.
            expected: Ranks that have yet to connect to the hub.
            silence_s: Silence after which a peer counts as lost.
        """
        self.rank = rank
        self._token = token
        self._expected = expected
        self._silence_s = silence_s
        self._peers = {peer.connection: peer for peer in peers}
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        for connection in (*self._peers, *([listener] if listener else [])):
            self._selector.register(connection, selectors.EVENT_READ)
        self._closing = threading.Event()
        self._failed = threading.Event()
        self._handled = threading.Event()
        self.failure: Failure | None = None
        """The first failure, if any. Reading it, unlike `lost`, leaves the end of the process to
        this object."""
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def lost(self, timeout_s: float = 0.0) -> Failure | None:
        """Return the first failure, such as a rank that is gone; waits up to `timeout_s`.

        A caller that receives a failure must end the process, which is otherwise ended here.
        """
        if not self._failed.wait(timeout_s):
            return None
        self._handled.set()
        return self.failure

    def send(self, payload: Message) -> None:
        """Send a short payload to rank 0 or, on rank 0, to all other ranks."""
        self._send_all({"payload": payload})

    def received(self) -> list[Message]:
        """Return the payloads that arrived since the last call."""
        return [self._inbox.get() for _ in range(self._inbox.qsize())]

    def end_job(self, message: str) -> None:
        """End all ranks, including this one, as if one was lost; `message` says why."""
        self._report_failure(Failure(PeerErrorKind.STUCK, message))

    def close(self, failure: Failure | None = None) -> None:
        """Say goodbye, or tell the others why this rank fails, and close all connections."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._handled.set()
        self._thread.join(timeout=2 * INTERVAL_S)
        farewell: Message = {"bye": True} if failure is None else failure.as_message()
        for peer in list(self._peers.values()):
            peer.send(farewell)
            peer.connection.close()
        if self._listener:
            self._listener.close()
        self._selector.close()

    def _run(self) -> None:
        next_heartbeat = 0.0
        while not self._closing.is_set():
            now = time.monotonic()
            if now >= next_heartbeat:
                if next_heartbeat and now - next_heartbeat > self._silence_s / 2:
                    # This process itself was stopped or starved. What the others sent in the
                    # meantime is still unread, so their silence proves nothing.
                    for peer in self._peers.values():
                        peer.heard = now
                self._send_all({})
                next_heartbeat = now + INTERVAL_S
            for key, _ in self._selector.select(timeout=0.2):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._receive(self._peers[key.fileobj])
            self._check_silence(time.monotonic())

    def _check_silence(self, now: float) -> None:
        for peer in list(self._peers.values()):
            if now - peer.heard > self._silence_s:
                if peer.known:
                    seconds = f"{self._silence_s:g} s"
                    text = f"{peer.name} has been silent for {seconds}: stopped, or cut off"
                    self._report_failure(Failure(PeerErrorKind.SILENT, text))
                self._disconnect(peer)
        if self._expected and now - self._started > _HELLO_S:
            ranks = ", ".join(map(str, sorted(self._expected)))
            text = f"rank {ranks} did not connect within {_HELLO_S:g} s"
            self._report_failure(Failure(PeerErrorKind.ABSENT, text))

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, address = self._listener.accept()
        except OSError:
            return
        connection.settimeout(INTERVAL_S)
        self._peers[connection] = Peer(connection, f"{address[0]}")
        self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, peer: Peer) -> None:
        try:
            lines = peer.receive()
            if lines is None:
                if peer.known:
                    text = f"{peer.name} is gone: its process ended without a word"
                    self._report_failure(Failure(PeerErrorKind.DEAD, text))
                self._disconnect(peer)
                return
            for line in lines:
                if not self._handle(peer, parse(line)):
                    self._disconnect(peer)
                    return
        except BadMessageError:
            self._disconnect(peer)

    def _handle(self, peer: Peer, message: Message) -> bool:
        """Process one message; returns whether to keep the connection."""
        if not peer.known:
            self._expected.discard(peer.identify(message, self._token))
        elif message.get("bye"):
            return False
        elif "lost" in message:
            self._report_failure(Failure.of_message(message))
            return False
        elif isinstance(message.get("payload"), dict):
            self._inbox.put(message["payload"])
        return True

    def _report_failure(self, failure: Failure) -> None:
        """Keep the first failure, forward it to all peers, and make sure that this process ends."""
        if self._failed.is_set() or self._closing.is_set():
            return
        self.failure = failure
        self._failed.set()
        self._send_all(failure.as_message())
        threading.Thread(target=self._exit_if_hanging, args=(failure,), daemon=True).start()

    def _exit_if_hanging(self, failure: Failure) -> None:
        if not self._handled.wait(NOTICE_S):
            print(f"rank {self.rank}: {failure.text}", file=sys.stderr, flush=True)
            os._exit(ExitCode.LOST_PEER)

    def _send_all(self, message: Message) -> None:
        for peer in list(self._peers.values()):
            peer.send(message)

    def _disconnect(self, peer: Peer) -> None:
        if self._peers.pop(peer.connection, None) is not None:
            self._selector.unregister(peer.connection)
            peer.connection.close()


@contextmanager
def heartbeat(device: torch.device, *, silence_s: float = SILENCE_S) -> Iterator[Heartbeat | None]:
    """Monitor the ranks of this job while the context is open; None in a job of one rank.

    Collective on entry: rank 0 broadcasts where it listens.

    Raises:
        PeerError: Instead of the error that a lost rank caused on this one.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        yield None
        return
    monitor = _connect(rank, device, silence_s)
    try:
        yield monitor
    except BaseException as error:
        # A collective fails here because of an event elsewhere: wait for the report. Other errors
        # are this rank's own, or occur on all ranks.
        is_effect = isinstance(error, RuntimeError) and not isinstance(
            error, torch.OutOfMemoryError
        )
        lost = monitor.lost(NOTICE_S) if is_effect else None
        if lost is None:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            text = f"rank {rank} (host {host_name()}) failed: {reason}"
            monitor.close(Failure(PeerErrorKind.FAILED, text))
            if is_effect and "timed out" in str(error).lower():
                raise PeerError(
                    "a collective timed out though every rank is alive: one of them is stuck, or "
                    f"did not enter it ({reason})",
                    PeerErrorKind.STUCK,
                ) from error
            raise
        monitor.close()
        raise PeerError(f"{lost.text}; this rank ends", lost.kind) from error
    monitor.close()


def _connect(rank: int, device: torch.device, silence_s: float) -> Heartbeat:
    """Connect to the hub, which listens on the job's master address. Collective."""
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
        return Heartbeat(rank, [], listener, token, expected=others, silence_s=silence_s)
    try:
        connection = socket.create_connection((host, port), timeout=_HELLO_S)
    except OSError as error:
        raise PeerError(
            f"rank {rank} cannot reach rank 0 at {host}:{port}: {error}; allow connections on all "
            "ports between the nodes of the job",
            PeerErrorKind.ABSENT,
        ) from error
    connection.settimeout(INTERVAL_S)
    hub = Peer(connection, f"rank 0 (host {hub_host})", known=True)
    hub.send({"hello": token, "rank": rank, "host": host_name()})
    return Heartbeat(rank, [hub], None, token, expected=set(), silence_s=silence_s)


def _listen(host: str) -> socket.socket:
    """Listen on loopback if the job does not leave this machine, else on all addresses.

    A name counts as remote: it may mean loopback on rank 0's own host only.
    """
    is_local = host in ("localhost", "127.0.0.1", "::1")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host if is_local else "", 0), family=family, backlog=4096)
    listener.setblocking(False)
    return listener
