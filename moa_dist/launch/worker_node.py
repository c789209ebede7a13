"""A node other than node 0 of a job whose nodes are started one by one; it obeys node 0.

`moa_dist.launch.leader` documents the messages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from moa_dist.config.run import Config
from moa_dist.errors import ExitCode
from moa_dist.launch.checked_host import HostProcess, NoAnswerError
from moa_dist.launch.handshake import Message, WrongJobError
from moa_dist.launch.hostfile import Host
from moa_dist.launch.leader import Node
from moa_dist.launch.link import Link, LinkLostError, connect
from moa_dist.launch.local import LocalJob, RankPlacement
from moa_dist.launch.retry import Waiting

_POLL_S = 0.2
_CONNECT_S = 10.0


class WorkerNode:
    """This node while it is connected to node 0."""

    def __init__(self, link: Link, command: Sequence[str], waiting: Waiting) -> None:
        self._link, self._command, self._waiting = link, command, waiting
        self._checks: HostProcess | None = None
        self._job: LocalJob | None = None
        self._preempt_sent = False

    def run(self) -> ExitCode | None:
        """Process messages until the job ends; returns its status, or None if node 0 is lost."""
        try:
            while True:
                message = self._link.receive(_POLL_S)
                if message is not None and "exit" in message:
                    if "text" in message:
                        self._waiting.say(message["text"])
                    return ExitCode(message["exit"])
                if message is not None:
                    self._handle(message)
                self._check_job()
        except LinkLostError as lost:
            self._waiting.say(f"node 0 {lost}")
            if self._job is not None and lost.loss.reason != "silent":
                self._job.save_and_end()  # with the ranks of node 0, whose supervisor is gone
            return None
        finally:
            if self._job is not None:
                self._job.end()
            self._end_checks()
            self._link.close()

    def _handle(self, message: Message) -> None:
        if "ask" in message:
            self._link.send({"answer": self._answer(message["ask"])})
        elif "start" in message:
            self._end_checks()
            place = message["start"]["place"]
            hosts = [Host(**host) for host in place.pop("hosts")]
            folder = Path(message["start"]["folder"])
            self._job = LocalJob(folder, self._command, None, RankPlacement(hosts=hosts, **place))
        elif self._job is not None and "preempt" in message:
            self._job.preempt()
        elif self._job is not None and "end" in message:
            self._job.end()

    def _answer(self, request: Message) -> Message:
        self._checks = self._checks or HostProcess()
        try:
            return self._checks.ask(request)
        except NoAnswerError as error:
            self._end_checks()
            return {"error": str(error), "remedy": error.remedy}

    def _end_checks(self) -> None:
        if self._checks is not None:
            self._checks.close()
            self._checks = None

    def _check_job(self) -> None:
        if self._waiting.preemption.requested and not self._preempt_sent:
            self._preempt_sent = True
            self._link.send({"preempt": True})
        if self._job is not None and self._job.wait(0.0):
            self._job.end()
            self._job = None
            self._link.send({"ended": True})


def follow(node: Node, config: Config, command: Sequence[str], waiting: Waiting) -> ExitCode:
    """Obey node 0 until the job ends; returns the job's status.

    Waits for node 0 at the start and whenever it is lost, up to the limit.
    """
    where, key = f"node 0 at {node.address}:{node.port}", node.key(config)
    since, announced = time.monotonic(), False
    while not waiting.preemption.requested:
        try:
            link = connect(node.address, node.port, key, node.hello(), _CONNECT_S)
        except WrongJobError as error:
            waiting.say(f"{where} refused this node: {error}")
            return ExitCode.USER
        except OSError as error:
            if time.monotonic() - since > waiting.limit_s:
                waiting.say(f"gave up waiting for {where} after {waiting.limit_s:g} s: {error}")
                return ExitCode.LOST_PEER
            if not announced:
                waiting.say(f"waiting up to {waiting.limit_s:g} s for {where}: {error}")
                announced = True
            waiting.sleep(_POLL_S)
            continue
        code = WorkerNode(link, command, waiting).run()
        if code is not None:
            return code
        since, announced = time.monotonic(), False
    return ExitCode.PREEMPTED
