"""Asking a host what `moa_dist.doctor.host` knows of it, wherever that runs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import Any, Protocol

from moa_dist.launch import ssh

ANSWER_S = 120.0
"""Longest wait for an answer: a file system that hangs takes a host's checks with it."""
MODULE = "moa_dist.doctor.host"

Message = dict[str, Any]


class NoAnswerError(Exception):
    """Why a host does not answer, and what to do about it."""

    def __init__(self, text: str, remedy: str = "", *, unreachable: bool = False) -> None:
        super().__init__(text)
        self.remedy = remedy
        self.unreachable = unreachable
        """It may be back later."""


class CheckedHost(Protocol):
    """A host that can be asked."""

    def ask(self, request: Message) -> Message:
        """Raises NoAnswerError."""

    def close(self) -> None:
        """It is asked no more."""


class HostProcess:
    """The answering process, here or, through ssh, on another host."""

    def __init__(self, ssh_host: str | None = None, ssh_args: str = "") -> None:
        """`ssh_host`: where it runs; None for this machine."""
        here = [sys.executable, "-m", MODULE]
        self._host = ssh_host
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            here if ssh_host is None else ssh.on_host(ssh_host, MODULE, ssh_args),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # so that Ctrl-C reaches this process alone
        )

    def ask(self, request: Message) -> Message:
        """See `moa_dist.doctor.host` for what it can be asked."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        timer = threading.Timer(ANSWER_S, self._process.kill)
        timer.start()
        answer = ""
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except OSError:  # it has ended; why is found below
            pass
        finally:
            timer.cancel()
        if not answer:
            raise self._failure()
        said: Message = json.loads(answer)
        if "error" in said:
            raise NoAnswerError(str(said["error"]))
        return said

    def close(self) -> None:
        """Ends the process, which its input's end asks it to."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=ssh.CONNECT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def _failure(self) -> NoAnswerError:
        try:
            status = self._process.wait(timeout=ssh.CONNECT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace").splitlines()
        if status < 0:
            return NoAnswerError(f"did not answer within {ANSWER_S:g} s", "see what hangs there")
        if self._host is None:
            last = errors[-1] if errors else f"exit status {status}"
            return NoAnswerError(f"its check failed: {last}")
        text, remedy = ssh.explain_ssh_failure(self._host, status, errors)
        return NoAnswerError(text, remedy, unreachable=status == 255)
