"""Queries `moa_dist.doctor.host` on a host, locally or through ssh."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from moa_dist.doctor.finding import Finding
from moa_dist.launch import ssh

ANSWER_S = 120.0
"""Longest wait for an answer; a hanging file system blocks a host's checks."""
MODULE = "moa_dist.doctor.host"
MAX_CONCURRENT = 64
"""Maximum number of hosts that are asked at the same time."""

Message = dict[str, Any]


class NoAnswerError(Exception):
    """A host did not answer. The message is the predicate of a sentence about the host."""

    def __init__(
        self,
        text: str,
        remedy: str = "",
        *,
        unreachable: bool = False,
        status: int | None = None,
    ) -> None:
        super().__init__(text)
        self.remedy = remedy
        """What to do about it; empty if unknown."""
        self.status = status
        """Exit status of the process that should have answered, if it ended."""
        self.unreachable = unreachable
        """Whether the host cannot be reached now, but may be later."""


class CheckedHost(Protocol):
    """A host that answers requests about itself."""

    def ask(self, request: Message) -> Message:
        """Send a request and return the answer.

        Raises:
            NoAnswerError: The host cannot answer.
        """

    def close(self) -> None:
        """Release the host; it will not be asked again."""


class HostProcess:
    """The answering process, on this machine or, through ssh, on another host."""

    def __init__(self, ssh_host: str | None = None, ssh_args: str = "") -> None:
        """Start the process on `ssh_host`; None for this machine."""
        command = [sys.executable, "-m", MODULE]
        self._host = ssh_host
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            command if ssh_host is None else ssh.on_host(ssh_host, MODULE, ssh_args),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # so that Ctrl-C only reaches the launcher
        )

    def ask(self, request: Message) -> Message:
        """Send a request, see `moa_dist.doctor.host`, and return the answer.

        Raises:
            NoAnswerError: The process failed, or did not answer in time.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        timer = threading.Timer(ANSWER_S, self._process.kill)
        timer.start()
        line = ""
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:  # it has ended; the reason is found below
            pass
        finally:
            timer.cancel()
        if not line:
            raise self._failure()
        answer: Message = json.loads(line)
        if "error" in answer:
            raise NoAnswerError(str(answer["error"]))
        return answer

    def close(self) -> None:
        """End the process by closing its input."""
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
            remedy = "check there for a hanging file system or process"
            return NoAnswerError(f"did not answer within {ANSWER_S:g} s", remedy)
        if self._host is None:
            last = errors[-1] if errors else f"exit status {status}"
            return NoAnswerError(f"could not run its check: {last}", status=status)
        failure = ssh.explain_ssh_failure(self._host, status, errors)
        return NoAnswerError(
            failure.text, failure.remedy, unreachable=failure.is_connection, status=status
        )


@dataclass
class Answers:
    """The answers of several hosts to one request."""

    by_host: dict[str, Message] = field(default_factory=dict)
    """The answers, in order of the hosts that gave one."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with the other hosts, and what is wrong according to the answers."""
    unreachable: list[str] = field(default_factory=list)
    """Hosts that cannot be reached now, but may be later."""


def ask_all(hosts: Mapping[str, CheckedHost], requests: Mapping[str, Message]) -> Answers:
    """Send every host its request, all at the same time."""

    def ask(name: str) -> Message | NoAnswerError:
        try:
            return hosts[name].ask(requests[name])
        except NoAnswerError as error:
            return error

    with ThreadPoolExecutor(MAX_CONCURRENT) as pool:
        results = dict(zip(requests, pool.map(ask, requests), strict=True))
    answers = Answers()
    for name, result in results.items():
        if isinstance(result, NoAnswerError):
            text = f"host {name} {result}"
            answers.findings.append(Finding("host", "FAULT", text, result.remedy, hosts=(name,)))
            answers.unreachable += [name] if result.unreachable else []
        else:
            answers.by_host[name] = result
    return answers
