"""How the two ends of a link prove to each other that they know their job's secret.

    hub  -> node   {"challenge": H}
    node -> hub    {"hello": {...}, "nonce": N, "proof": HMAC(key, ["node", H, N, hello])}
    hub  -> node   {"proof": HMAC(key, ["hub", H, N, hello])}, or {"refused": true}

The key is derived from the secret and the run's folder; neither is sent. Nonces are fresh for every
connection, so a recorded hello proves nothing later. This keeps out everyone who can reach the
port; it does not protect against someone who alters packets between the hosts of a job, where the
ranks' own traffic is not authenticated either.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from moa_dist.errors import ClusterError

SECRET_VARIABLE = "MOA_DIST_JOB_SECRET"
"""Environment variable with the job's secret, the same on all its nodes."""
MAX_LINE = 4096
"""Longest line, in bytes, that either end accepts before the other one is known."""
_MIN_SECRET = 16

Message = dict[str, Any]


class WrongJobError(ConnectionError):
    """The hub belongs to another job, or does not know the secret of this one."""


def take_secret(environment: MutableMapping[str, str]) -> str:
    """Remove the job's secret from the environment, so that no rank inherits it, and return it.

    Raises:
        ClusterError: The secret is missing or too short.
    """
    secret = environment.pop(SECRET_VARIABLE, "")
    if len(secret) >= _MIN_SECRET:
        return secret
    state = f"is shorter than {_MIN_SECRET} characters" if secret else "is not set"
    raise ClusterError(
        f"{SECRET_VARIABLE} {state}, so anyone who reaches the port of node 0 could take a node's "
        "place: set it to the same random text on all nodes, for example to the output of "
        "`openssl rand -hex 32`"
    )


def derive_key(secret: str, folder: Path) -> bytes:
    """Return the key of a job, which differs from those of other jobs with the same secret."""
    return hmac.digest(secret.encode(), f"moa-dist job {folder}".encode(), "sha256")


def new_nonce() -> str:
    """Return a random text that is never used again."""
    return secrets.token_hex(32)


def hub_proof(key: bytes, challenge: str, answer: Message) -> str | None:
    """Verify a node's answer to a challenge; returns the hub's own proof, None for a stranger."""
    nonce, hello, proof = (answer.get(name) for name in ("nonce", "hello", "proof"))
    if not isinstance(proof, str):
        return None
    try:
        expected = _prove(key, "node", challenge, nonce, hello)
        own = _prove(key, "hub", challenge, nonce, hello)
    except RecursionError:  # a stranger's nested lists
        return None
    return own.decode() if hmac.compare_digest(expected, proof.encode(errors="replace")) else None


def introduce(connection: socket.socket, key: bytes, hello: Message, timeout_s: float) -> None:
    """Carry out a node's part of the handshake.

    Raises:
        WrongJobError: The hub refused the proof, or could not give its own.
        OSError: The other end is gone, silent, or no hub.
    """
    deadline = time.monotonic() + timeout_s
    challenge, nonce = _receive(connection, deadline).get("challenge"), new_nonce()
    proof = _prove(key, "node", challenge, nonce, hello).decode()
    answer = {"hello": hello, "nonce": nonce, "proof": proof}
    connection.sendall(json.dumps(answer).encode() + b"\n")
    theirs = str(_receive(connection, deadline).get("proof")).encode(errors="replace")
    if not hmac.compare_digest(theirs, _prove(key, "hub", challenge, nonce, hello)):
        raise WrongJobError(
            f"it belongs to another job, or to this one with another {SECRET_VARIABLE} or run "
            "folder: start all nodes with the same ones, or with another --master-port"
        )


def parse(line: bytes) -> Message:
    """Parse a line from an unknown sender; returns an empty message if it is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _prove(key: bytes, end: str, challenge: Any, nonce: Any, hello: Any) -> bytes:
    text = json.dumps([end, challenge, nonce, hello], sort_keys=True)
    return hmac.new(key, text.encode(), "sha256").hexdigest().encode()


def _receive(connection: socket.socket, deadline: float) -> Message:
    """Receive one line and nothing after it, which belongs to the link."""
    line = b""
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("it did not answer the handshake in time")
        connection.settimeout(left)
        byte = connection.recv(1)
        if not byte or len(line) > MAX_LINE:
            raise ConnectionError("it closed the connection, or is no supervisor of this package")
        line += byte
    return parse(line)
