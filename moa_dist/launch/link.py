"""A connection between a job's supervisor and a node: messages, and knowing that the other lives.

Lines of JSON over TCP; `{}` is a beat. Either end notices within `SILENCE_S` that the other is
stopped or cut off, and at once that its process has ended.
"""

from __future__ import annotations

import hmac
import json
import queue
import select
import socket
import threading
import time
from typing import Any

from moa_dist.errors import ExitCode

BEAT_S = 2.0
"""Seconds between beats."""
SILENCE_S = 32.0
"""More than the ranks' own heartbeat needs to name the rank that is lost, see `heartbeat`."""
_HELLO_S = 10.0
_LONGEST = 2**24

Message = dict[str, Any]


class LinkLostError(Exception):
    """The other end is gone, or silent; says which of them."""


class Link:
    """One end of a connection. Thread-safe."""

    def __init__(self, connection: socket.socket, silence_s: float = SILENCE_S) -> None:
        connection.settimeout(BEAT_S)
        self._socket, self._silence_s = connection, silence_s
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._sending = threading.Lock()
        self._lost: str | None = None
        self._closed = threading.Event()
        self.address = str(connection.getpeername()[0])
        """Of the other end."""
        self.hello: Message = {}
        """What the other end said first, where this one is a hub's."""
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> str | None:
        """Why nothing will come any more, such as `is gone`; None while the other end lives."""
        return self._lost

    def send(self, message: Message) -> None:
        """A failure shows in `lost`."""
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError as error:
            self._lose(f"is gone ({error})")

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, None if none comes in time.

        Raises:
            LinkLostError: all messages were read, and no other will come.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            lost = self._lost  # before the inbox, which is filled before it is set
            left = 0.0 if lost else max(0.0, deadline - time.monotonic())
            try:
                return self._inbox.get(block=left > 0, timeout=min(left, 0.1))
            except queue.Empty:
                if lost:
                    raise LinkLostError(lost) from None
                if time.monotonic() >= deadline:
                    return None

    def close(self) -> None:
        """The other end learns of it at once."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=2 * BEAT_S)
        self._lose("was closed")
        self._socket.close()

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = why

    def _run(self) -> None:
        heard, next_beat, received = time.monotonic(), 0.0, b""
        while not self._closed.is_set() and self._lost is None:
            now = time.monotonic()
            if now >= next_beat:
                if next_beat and now - next_beat > self._silence_s / 2:
                    heard = now  # this process itself was stopped, which proves nothing
                self.send({})
                next_beat = now + BEAT_S
            if now - heard > self._silence_s:
                self._lose(f"has been silent for {self._silence_s:g} s: stopped, or cut off")
            if not select.select([self._socket], [], [], 0.1)[0]:
                continue
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            *lines, received = (received + data).split(b"\n")
            try:
                messages = [json.loads(line) for line in lines]
            except ValueError:
                return self._lose("speaks another language")
            for message in messages:
                if message:
                    self._inbox.put(message)
            if not data or len(received) > _LONGEST:
                return self._lose("is gone: its process ended, or closed the connection")
            heard = time.monotonic()
        return None


def connect(address: str, port: int, timeout_s: float) -> Link:
    """A link to the hub that listens there.

    Raises:
        OSError: nobody does.
    """
    return Link(socket.create_connection((address, port), timeout=timeout_s))


class Hub:
    """The supervisor's end of the links to all nodes. Thread-safe."""

    def __init__(self, address: str, port: int, token: str) -> None:
        """Listen; port 0 takes a free one, and address "" means all of this machine.

        Raises:
            OSError: the port is taken.
        """
        self.token = token
        """By which those are known that may connect."""
        self._listener = socket.create_server((address, port), backlog=4096)
        self._listener.settimeout(0.2)
        self.port: int = self._listener.getsockname()[1]
        """Where it listens."""
        self.links: dict[int, Link] = {}
        """By node, the newest of each."""
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name="hub", daemon=True).start()

    def hang_up(self) -> None:
        """End all links, by which the nodes end their ranks."""
        links, self.links = self.links, {}
        for link in links.values():
            link.close()

    def close(self) -> None:
        """Listen no more, and end all links."""
        self._closed.set()
        self._listener.close()
        self.hang_up()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:  # none came in time; or closed
                continue
            threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        link = Link(connection)
        try:
            hello = link.receive(_HELLO_S)
        except LinkLostError:
            hello = None
        known = hello is not None and hmac.compare_digest(
            str(hello.get("token", "")).encode(), self.token.encode()
        )
        if hello is None or not known or not isinstance(hello.get("node"), int):
            link.send({"exit": ExitCode.USER, "text": "this port belongs to another job"})
            link.close()
            return
        before = self.links.get(hello["node"])
        link.hello = hello
        self.links[hello["node"]] = link
        if before is not None:  # it was started again before its end was noticed, or twice
            text = f"another process took the place of node {hello['node']}"
            before.send({"exit": ExitCode.USER, "text": text})
            before.close()
