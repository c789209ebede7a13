"""One end of a heartbeat connection: framing, identification and the time of the last message.

Messages are lines of JSON: `{}` is a heartbeat, `{"hello": token, "rank": r, "host": h}` the first
message, `{"bye": true}` a clean exit, `{"lost": text, "kind": kind}` a failure. Other users of the
connection exchange `{"payload": ...}` between rank 0 and any other rank.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from typing import Any, NamedTuple

from moa_dist.errors import PeerErrorKind

Message = dict[str, Any]

_MAX_LINE = 4096


class BadMessageError(Exception):
    """The other end sent something that is not a message of this protocol."""


class Failure(NamedTuple):
    """Why all ranks of a job must end."""

    kind: PeerErrorKind
    """What happened."""
    text: str
    """The rank that it happened to, and details, in one line."""

    def as_message(self) -> Message:
        """Return the message that reports the failure to another rank."""
        return {"lost": self.text, "kind": self.kind}

    @staticmethod
    def of_message(message: Message) -> Failure:
        """Read a message that reports a failure.

        Raises:
            BadMessageError: It has no known kind.
        """
        try:
            return Failure(PeerErrorKind(message["kind"]), str(message["lost"]))
        except (KeyError, ValueError) as error:
            raise BadMessageError(f"not a report of a failure: {error!r}") from error


class Peer:
    """The rank at the other end of a connection. Sending is thread-safe."""

    def __init__(self, connection: socket.socket, name: str, *, known: bool = False) -> None:
        self.connection = connection
        self.name = name
        """Such as `rank 3 (host node-1)`; the address until the peer has identified itself."""
        self.known = known
        """Whether the peer has identified itself with the right token."""
        self.heard = time.monotonic()
        """When the last data arrived, in monotonic seconds."""
        self._unfinished = b""
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message; a failure is ignored, since receiving reports how the peer ended."""
        try:
            with self._sending:
                self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[bytes] | None:
        """Return the complete lines that have arrived; None if the connection was closed.

        Raises:
            BadMessageError: A line is too long.
        """
        try:
            data = self.connection.recv(_MAX_LINE)
        except OSError:
            data = b""
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        if len(self._unfinished) > _MAX_LINE:
            raise BadMessageError(f"{self.name} sent a line of more than {_MAX_LINE} bytes")
        return lines

    def identify(self, message: Message, token: str) -> int:
        """Read the peer's first message and return its rank.

        Raises:
            BadMessageError: The message does not carry the job's token.
        """
        try:
            if not secrets.compare_digest(message["hello"], token):
                raise BadMessageError(f"{self.name} sent a wrong token")
            rank = int(message["rank"])
            self.name = f"rank {rank} (host {message['host']})"
        except (ValueError, KeyError, TypeError) as error:
            raise BadMessageError(f"{self.name} did not identify itself: {error!r}") from error
        self.known = True
        return rank


def parse(line: bytes) -> Message:
    """Decode one line.

    Raises:
        BadMessageError: It is not a JSON object.
    """
    try:
        message = json.loads(line)
    except ValueError as error:
        raise BadMessageError(str(error)) from error
    if not isinstance(message, dict):
        raise BadMessageError("a message is a JSON object")
    return message
