"""The supervisor's end of the links to all nodes of a job, which keeps strangers out."""

from __future__ import annotations

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from moa_dist.errors import ExitCode
from moa_dist.launch.handshake import MAX_LINE, Message, hub_proof, new_nonce, parse
from moa_dist.launch.link import Link

MAX_CANDIDATES = 256
"""Maximum number of connections that are open without having proven anything. More wait in the
listener's queue, so that strangers use up neither file descriptors nor memory."""
_HELLO_S = 10.0
_CROWDED_HELLO_S = 0.5
"""Time for the proof when the maximum is reached; a node needs a few milliseconds."""
_MAX_REPORTS = 8


@dataclass
class _Candidate:
    """A connection that has not proven to be a node."""

    connection: socket.socket
    address: str
    challenge: str = field(default_factory=new_nonce)
    since: float = field(default_factory=time.monotonic)
    unread: bytes = b""

    def read(self) -> Message | None:
        """Read what has arrived; returns the whole answer, an empty one if it is none, or None."""
        try:
            data = self.connection.recv(MAX_LINE)
        except BlockingIOError:
            return None
        except OSError:
            return {}
        self.unread += data
        if data and b"\n" not in self.unread and len(self.unread) <= MAX_LINE:
            return None
        return parse(self.unread) if self.unread.endswith(b"\n") else {}


class Hub:
    """Accepts the nodes of a job. Thread-safe.

    One thread carries out all handshakes, see `moa_dist.launch.handshake`. A connection changes
    nothing until it has proven to know the job's key.
    """

    def __init__(
        self, address: str, port: int, key: bytes, report: Callable[[str], None] = lambda _: None
    ) -> None:
        """Listen; port 0 picks a free port, and address "" means all addresses of this machine.

        `report` receives one line per address from which strangers connect, and at most a few.

        Raises:
            OSError: The port is in use.
        """
        self.key = key
        """What the nodes of this job have to know."""
        self._report, self._strangers = report, set[str]()
        self._listener = socket.create_server((address, port), backlog=4096)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        """The port it listens on."""
        self.links: dict[int, Link] = {}
        """The newest link of each node."""
        self._candidates: dict[socket.socket, _Candidate] = {}
        self._selector = selectors.DefaultSelector()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self._thread.start()

    def close_links(self) -> None:
        """Close all links, upon which the nodes end their ranks."""
        links, self.links = self.links, {}
        for link in links.values():
            link.close()

    def close(self) -> None:
        """Stop listening, and close all links."""
        self._closed.set()
        self._thread.join()
        self.close_links()

    def _run(self) -> None:
        listening = False
        with self._selector, self._listener:
            while not self._closed.is_set():
                if listening != (len(self._candidates) < MAX_CANDIDATES):
                    listening = not listening
                    if listening:
                        self._selector.register(self._listener, selectors.EVENT_READ)
                    else:
                        self._selector.unregister(self._listener)
                for key, _ in self._selector.select(timeout=0.2):
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._answer(self._candidates[key.fileobj])
                self._drop_slow()
            for candidate in list(self._candidates.values()):
                self._release(candidate)
                candidate.connection.close()

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:  # it gave up, or this process has too many open files
            time.sleep(0.01)
            return
        connection.setblocking(False)
        candidate = _Candidate(connection, str(address[0]))
        self._candidates[connection] = candidate
        self._selector.register(connection, selectors.EVENT_READ)
        self._send(candidate, {"challenge": candidate.challenge})

    def _answer(self, candidate: _Candidate) -> None:
        answer = candidate.read()
        if answer is None:
            return
        hello = answer.get("hello")
        proof = hub_proof(self.key, candidate.challenge, answer)
        if proof is None or not isinstance(hello, dict) or not isinstance(hello.get("node"), int):
            self._send(candidate, {"refused": True})
            self._reject(candidate)
            return
        self._release(candidate)
        self._send(candidate, {"proof": proof})
        self._admit(Link(candidate.connection), hello)

    def _admit(self, link: Link, hello: Message) -> None:
        before = self.links.get(hello["node"])
        link.hello = hello
        self.links[hello["node"]] = link
        if before is not None:  # restarted before its end was noticed, or started twice
            text = f"another process replaced this one as node {hello['node']}"
            before.send({"exit": ExitCode.USER, "text": text})
            threading.Thread(target=before.close, daemon=True).start()

    def _drop_slow(self) -> None:
        """Close connections that do not answer; a node has time, unless strangers crowd it out."""
        crowded = len(self._candidates) >= MAX_CANDIDATES
        oldest = time.monotonic() - (_CROWDED_HELLO_S if crowded else _HELLO_S)
        for candidate in list(self._candidates.values()):
            if candidate.since > oldest:
                break  # they are in the order of their arrival
            self._reject(candidate)

    def _reject(self, candidate: _Candidate) -> None:
        self._release(candidate)
        address = candidate.address
        if address not in self._strangers and len(self._strangers) < _MAX_REPORTS:
            self._strangers.add(address)
            self._report(
                f"ignored a connection from {address} to port {self.port} that does not know this "
                "job's secret; further ones are not reported"
            )
        candidate.connection.close()

    def _release(self, candidate: _Candidate) -> None:
        self._selector.unregister(candidate.connection)
        del self._candidates[candidate.connection]

    def _send(self, candidate: _Candidate, message: Message) -> None:
        with suppress(OSError):  # it is gone, which reading will tell
            candidate.connection.send(json.dumps(message).encode() + b"\n")
