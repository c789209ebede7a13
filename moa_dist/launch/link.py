"""A connection between a job's supervisor and a node, which notices when the other end is lost.

Both ends first prove that they know the job's secret, see `moa_dist.launch.handshake`. Messages are
lines of JSON over TCP; `{}` is a heartbeat. Either end notices within `SILENCE_S` that
the other one is stopped or cut off, and immediately that its process has ended.
"""

from __future__ import annotations

import json
import queue
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import Literal

from moa_dist.launch.handshake import Message, introduce

HEARTBEAT_S = 2.0
"""Seconds between heartbeats."""
SILENCE_S = 32.0
"""Silence after which the other end counts as lost. Longer than the ranks' own heartbeat needs to
name a lost rank, see `moa_dist.distributed.heartbeat`."""
_MAX_LINE = 2**24


@dataclass(frozen=True)
class Loss:
    """Why a connection is lost."""

    reason: Literal["gone", "silent", "invalid", "closed"]
    """`gone`: the other process ended; `silent`: it is stopped or cut off; `invalid`: it does not
    speak this protocol; `closed`: this end closed the connection."""
    text: str
    """The predicate of a sentence about the other end, such as `is gone`."""

    def __str__(self) -> str:
        return self.text


class LinkLostError(Exception):
    """The other end of a link is lost."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(str(loss))
        self.loss = loss


class Link:
    """One end of a connection. Thread-safe."""

    def __init__(self, connection: socket.socket, silence_s: float = SILENCE_S) -> None:
        connection.settimeout(HEARTBEAT_S)
        self._socket, self._silence_s = connection, silence_s
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._sending = threading.Lock()
        self._lost: Loss | None = None
        self._closed = threading.Event()
        self.hello: Message = {}
        """Description of the node, on links of a hub; `reached` is the address that it used."""
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> Loss | None:
        """Why no more messages will arrive; None while the other end is alive."""
        return self._lost

    def send(self, message: Message) -> None:
        """Send a message; a failure is recorded in `lost`."""
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError as error:
            self._lose(Loss("gone", f"is gone ({error})"))

    def receive(self, timeout_s: float) -> Message | None:
        """Return the next message, or None if none arrives in time.

        Raises:
            LinkLostError: All messages have been read, and no more will arrive.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            lost = self._lost  # read before the inbox, which is filled before it is set
            left = 0.0 if lost else max(0.0, deadline - time.monotonic())
            try:
                return self._inbox.get(block=left > 0, timeout=min(left, 0.1))
            except queue.Empty:
                if lost:
                    raise LinkLostError(lost) from None
                if time.monotonic() >= deadline:
                    return None

    def close(self) -> None:
        """Close the connection, which the other end notices immediately."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=2 * HEARTBEAT_S)
        self._lose(Loss("closed", "was disconnected"))
        self._socket.close()

    def _lose(self, loss: Loss) -> None:
        if self._lost is None:
            self._lost = loss

    def _run(self) -> None:
        heard, next_heartbeat, unfinished = time.monotonic(), 0.0, b""
        arrivals = select.poll()  # select.select() fails with 1,024 open files
        arrivals.register(self._socket, select.POLLIN)
        while not self._closed.is_set() and self._lost is None:
            now = time.monotonic()
            if now >= next_heartbeat:
                if next_heartbeat and now - next_heartbeat > self._silence_s / 2:
                    heard = now  # this process itself was stopped, so silence proves nothing
                self.send({})
                next_heartbeat = now + HEARTBEAT_S
            if now - heard > self._silence_s:
                seconds = f"{self._silence_s:g} s"
                self._lose(Loss("silent", f"has been silent for {seconds}: stopped, or cut off"))
            if not arrivals.poll(100):
                continue
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            *lines, unfinished = (unfinished + data).split(b"\n")
            try:
                messages = [json.loads(line) for line in lines]
            except ValueError:
                return self._lose(Loss("invalid", "sent something other than messages"))
            for message in messages:
                if message:
                    self._inbox.put(message)
            if not data or len(unfinished) > _MAX_LINE:
                text = "is gone: its process ended, or closed the connection"
                return self._lose(Loss("gone", text))
            heard = time.monotonic()
        return None


def connect(address: str, port: int, key: bytes, hello: Message, timeout_s: float) -> Link:
    """Connect to the hub that listens at an address and port, as the node that `hello` describes.

    Raises:
        WrongJobError: The hub belongs to another job.
        OSError: The connection failed.
    """
    connection = socket.create_connection((address, port), timeout=timeout_s)
    reached = str(connection.getpeername()[0])
    try:
        introduce(connection, key, {**hello, "reached": reached}, timeout_s)
    except BaseException:
        connection.close()
        raise
    return Link(connection)
