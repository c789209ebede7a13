"""Node 0 of a job whose nodes are started one by one, as Slurm and Kubernetes do: the leader.

Node 0 listens on the job's address; the others (`worker_node.py`) connect, are checked, and start
and end their ranks on its command. A single node decides, so that all nodes start the same attempt
and exit with the same status.

Messages to a node: `ask`, a request for its checks; `start`, start an attempt; `preempt`, let the
ranks save and stop; `end`, end the ranks; `exit`, the job is over. Messages from a node: `answer`,
to a request; `ended`, its ranks have ended; `preempt`, it was asked to stop. Only nodes that know
the job's secret are connected (`handshake.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from moa_dist.config.run import Config, run_folder
from moa_dist.distributed.network import free_port, is_loopback
from moa_dist.doctor.finding import Finding
from moa_dist.errors import ClusterError, ExitCode
from moa_dist.launch.checked_host import ANSWER_S, HostProcess, NoAnswerError
from moa_dist.launch.failure import Cause
from moa_dist.launch.handshake import Message, derive_key
from moa_dist.launch.hub import Hub
from moa_dist.launch.link import Link, LinkLostError
from moa_dist.launch.local import END_S, LocalJob, RankPlacement
from moa_dist.launch.overdue import Overdue
from moa_dist.launch.preflight import Preflight, Wanted, preflight
from moa_dist.launch.retry import Waiting

_POLL_S = 0.2


@dataclass(frozen=True)
class Node:
    """The position of this process in the job."""

    nodes: int
    """Number of nodes."""
    rank: int
    """Number of this node."""
    address: str
    """Address of node 0 for the others."""
    port: int
    """Port that node 0 listens on."""
    ranks: int | None
    """Number of ranks to start here; None for one per GPU, or one without GPUs."""
    host: str
    """Name of this machine in messages."""
    secret: str = field(repr=False)
    """The job's secret."""

    def key(self, config: Config) -> bytes:
        """Return the key by which the nodes of this job recognize each other."""
        return derive_key(self.secret, run_folder(config))

    def hello(self) -> Message:
        """Return the description of this node with which it connects."""
        return {
            "node": self.rank,
            "nodes": self.nodes,
            "ranks": self.ranks,
            "host": self.host,
        }


class RemoteNode:
    """Node 0's view of another node. Used by one thread at a time."""

    def __init__(self, link: Link, waiting: Waiting) -> None:
        self.link, self._waiting = link, waiting
        self.ended = True
        """Whether it has no ranks running, as far as is known."""

    def ask(self, request: Message) -> Message:
        """Let the node run a check, and return its answer.

        Raises:
            NoAnswerError: The node is lost, or cannot answer.
        """
        self.link.send({"ask": request})
        deadline = time.monotonic() + 2 * ANSWER_S
        while time.monotonic() < deadline:
            message = self.poll(_POLL_S)
            if message is not None and "answer" in message:
                answer: Message = message["answer"]
                if "error" in answer:
                    raise NoAnswerError(answer["error"], answer["remedy"])
                return answer
            if self.link.lost:
                raise NoAnswerError(str(self.link.lost), unreachable=True)
        raise NoAnswerError(f"did not answer within {2 * ANSWER_S:g} s")

    def close(self) -> None:
        """Do nothing: the link stays open."""

    def poll(self, timeout_s: float) -> Message | None:
        """Receive and process the next message, and return it; None if none arrives in time."""
        try:
            message = self.link.receive(timeout_s)
        except LinkLostError:
            self.ended = True
            return None
        if message is not None and "ended" in message:
            self.ended = True
        if message is not None and "preempt" in message:
            self._waiting.preemption.requested = True
        return message


class NodesJob:
    """One attempt on all nodes."""

    def __init__(
        self, folder: Path, job: LocalJob, remotes: dict[str, RemoteNode], place: RankPlacement
    ) -> None:
        """Tell the other nodes to start their ranks; `job` runs those of this node."""
        self._job, self._remotes = job, remotes
        self._overdue = Overdue(folder)
        self.problem: str | None = None
        for node, remote in enumerate(remotes.values(), 1):
            remote.ended = False
            there = asdict(replace(place, node=node))
            remote.link.send({"start": {"folder": str(folder), "place": there}})

    def wait(self, timeout_s: float) -> bool:
        """Return whether the ranks of all reachable nodes have ended; waits up to `timeout_s`."""
        is_over = self._job.wait(timeout_s)
        for name, remote in self._remotes.items():
            while remote.poll(0.0) is not None:
                pass
            if remote.link.lost is not None and self.problem is None:
                self.problem = f"host {name} {remote.link.lost}"
                self.end()
        if self.problem is None:
            self.problem = self._overdue.problem()
            if self.problem is not None:
                self.end()
        return is_over and all(remote.ended for remote in self._remotes.values())

    def preempt(self) -> None:
        """Ask the ranks of all nodes to save and stop."""
        self._job.preempt()
        for remote in self._remotes.values():
            remote.link.send({"preempt": True})

    def end(self) -> None:
        """End the ranks of all reachable nodes; a node that is cut off ends its own."""
        for remote in self._remotes.values():
            remote.link.send({"end": True})
        self._job.end()
        deadline = time.monotonic() + 2 * END_S
        for remote in self._remotes.values():
            while not remote.ended and time.monotonic() < deadline:
                remote.poll(_POLL_S)


class NodesLauncher:
    """Starts attempts on all nodes; used on node 0."""

    def __init__(
        self, node: Node, config: Config, command: Sequence[str], wanted: Wanted, waiting: Waiting
    ) -> None:
        """Listen for the other nodes.

        Raises:
            ClusterError: The port is in use.
        """
        self._node, self._command, self._waiting = node, command, waiting
        self._wanted, self._checked = wanted, Preflight()
        address = node.address if is_loopback(node.address) else ""
        try:
            self._hub = Hub(address, node.port, node.key(config), waiting.say)
        except OSError as error:
            raise ClusterError(
                f"node 0 cannot listen on port {node.port} ({error.strerror}): end the process "
                "that uses it (moa-dist doctor names it), or start all nodes with another "
                "--master-port"
            ) from error
        self._remotes: dict[str, RemoteNode] = {}
        self.ends_with = ExitCode.DEFECT
        """The job's exit code, which the other nodes exit with."""

    def ready(self) -> Cause | None:
        """Wait for all nodes and check them; returns why no attempt can start, or None."""
        found = self._waiting.until_fit(self._check)
        if isinstance(found, Cause):
            return found
        self._checked = found
        return None

    def start(self, folder: Path) -> NodesJob:
        """Start an attempt that writes its logs to `folder`."""
        checked = self._checked
        place = RankPlacement(checked.hosts, 0, checked.master_addr, checked.master_port)
        job = LocalJob(folder, self._command, None, place)
        return NodesJob(folder.absolute(), job, self._remotes, place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let all nodes exit with the job's status."""
        for link in list(self._hub.links.values()):
            link.send({"exit": self.ends_with})
        self._hub.close()

    def _check(self) -> Preflight:
        """Check all nodes; if some are missing, only report these."""
        self._reject_mismatched()
        missing, names = Preflight(), [self._node.host]
        links = {node: self._hub.links.get(node) for node in range(1, self._node.nodes)}
        remotes: list[RemoteNode] = []
        for node, link in links.items():
            if link is not None:
                remotes.append(RemoteNode(link, self._waiting))
                remotes[-1].poll(0.0)
                names.append(link.hello["host"])
            if link is None or link.lost:
                missing.unreachable.append(f"node {node}")
                text = f"node {node} is not connected"
                missing.findings.append(Finding("host", "FAULT", text, subject=f"node {node}"))
        if missing.unreachable:
            return missing
        unique = len(set(names)) == len(names)
        names = [name if unique else f"{name}-{node}" for node, name in enumerate(names)]
        self._remotes = dict(zip(names[1:], remotes, strict=True))
        slots = [self._node.ranks, *(remote.link.hello["ranks"] for remote in remotes)]
        # The given name of this node may resolve to loopback here, so use the address that the
        # others reached.
        address = remotes[0].link.hello["reached"] if remotes else self._node.address
        wanted = replace(self._wanted, master_addr=address, master_port=free_port())
        own = HostProcess()
        try:
            return preflight({names[0]: own, **self._remotes}, slots, wanted)
        finally:
            own.close()

    def _reject_mismatched(self) -> None:
        nodes = self._node.nodes
        for node, link in list(self._hub.links.items()):
            theirs = link.hello["nodes"]
            if theirs != nodes or not 0 < node < nodes:
                text = f"node 0 was started with --nodes {nodes}, which has no node {node}"
                if theirs != nodes:
                    text = f"node 0 was started with --nodes {nodes}, but this one with {theirs}"
                link.send({"exit": ExitCode.USER, "text": text})
