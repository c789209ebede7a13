"""Nodes that are started one by one: node 0 leads, and all start together and end alike.

Checks and ranks are fakes, links are real.
"""

import io
import threading
import time
from pathlib import Path

import pytest

from moa_dist.config import load_config
from moa_dist.config.run import Config
from moa_dist.distributed.network import free_port
from moa_dist.distributed.preemption import Preemption
from moa_dist.errors import ClusterError, ExitCode
from moa_dist.launch import leader, worker_node
from moa_dist.launch.failure import CauseKind
from moa_dist.launch.leader import Node, NodesLauncher
from moa_dist.launch.preflight import Wanted
from moa_dist.launch.retry import Waiting
from tests.launch.test_preflight import FakeHost

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0
SECRET = "s" * 16


class Ranks:
    """Ranks of a node, which run until they are asked to stop."""

    problem = None
    started: list["Ranks"]

    def __init__(self, folder, command, ranks, place) -> None:
        self.place, self.over = place, threading.Event()
        self.was_preempted = False
        self.started.append(self)

    def wait(self, timeout_s: float) -> bool:
        return self.over.wait(timeout_s)

    def preempt(self) -> None:
        self.was_preempted = True
        self.over.set()

    def end(self) -> None:
        self.over.set()

    def save_and_end(self) -> None:
        self.over.set()


@pytest.fixture
def started(monkeypatch) -> list[Ranks]:
    """The ranks of all nodes, in the order of their start."""
    monkeypatch.setattr(Ranks, "started", [], raising=False)
    for module in (leader, worker_node):
        monkeypatch.setattr(module, "LocalJob", Ranks)
        monkeypatch.setattr(module, "HostProcess", lambda: FakeHost())
    return Ranks.started


@pytest.fixture
def config(tmp_path) -> Config:
    overrides = [f"output={tmp_path}", "name=x", "data.train=none"]
    return load_config(str(ROOT / "configs/small/dense.yaml"), overrides)


class Cluster:
    """Two nodes on loopback; the second runs in a thread."""

    def __init__(self, config: Config) -> None:
        self.config, self.port = config, free_port()
        self.console, self.preemption = io.StringIO(), Preemption()
        self.status: ExitCode | None = None

    def waiting(self, limit_s: float = WAIT_S) -> Waiting:
        return Waiting(limit_s, self.preemption, self.console, from_the_start=True)

    def node(self, rank: int, num_nodes: int = 2, secret: str = SECRET) -> Node:
        return Node(num_nodes, rank, "127.0.0.1", self.port, 1, f"host-{rank}", secret)

    def leader(self, limit_s: float = WAIT_S) -> NodesLauncher:
        return NodesLauncher(self.node(0), self.config, [], Wanted(None), self.waiting(limit_s))

    def follow(
        self,
        rank: int = 1,
        num_nodes: int = 2,
        limit_s: float = WAIT_S,
        secret: str = SECRET,
    ) -> threading.Thread:
        def run() -> None:
            node = self.node(rank, num_nodes, secret)
            self.status = worker_node.follow(node, self.config, [], self.waiting(limit_s))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread


def until(happens) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nodes_start_together_stop_when_asked_and_end_alike(config, started, tmp_path):
    cluster = Cluster(config)
    thread = cluster.follow()  # starts first, and waits
    with cluster.leader() as leader:
        assert leader.ready() is None
        job = leader.start(tmp_path)
        until(lambda: len(started) == 2)
        assert {ranks.place.node for ranks in started} == {0, 1}
        assert [host.name for host in started[1].place.hosts] == ["host-0", "host-1"]
        assert started[0].place.master_port == started[1].place.master_port
        assert not job.wait(0.0)
        job.preempt()
        until(lambda: job.wait(0.0))
        assert all(ranks.was_preempted for ranks in started)
        leader.ends_with = ExitCode.PREEMPTED
    thread.join(WAIT_S)
    assert cluster.status is ExitCode.PREEMPTED


def test_asking_any_node_to_stop_asks_the_job(config, started, tmp_path):
    cluster = Cluster(config)
    thread = cluster.follow()
    with cluster.leader() as leader:
        assert leader.ready() is None
        leader._waiting.preemption = Preemption()  # node 0's own
        job = leader.start(tmp_path)
        until(lambda: len(started) == 2)
        cluster.preemption.requested = True  # node 1's
        until(lambda: job.wait(0.0) or leader._waiting.preemption.requested)
        job.end()
    thread.join(WAIT_S)


def test_lost_node_is_named_and_may_come_back(config, started, tmp_path):
    cluster = Cluster(config)
    cluster.follow()
    with cluster.leader() as leader:
        assert leader.ready() is None
        job = leader.start(tmp_path)
        until(lambda: len(started) == 2)
        leader._hub.links[1].close()  # as if cut; the node ends its ranks and connects again
        until(lambda: job.wait(0.0))
        assert "host-1" in (job.problem or "")
        until(started[1].over.is_set)
        assert leader.ready() is None
        leader.start(tmp_path)
        until(lambda: len(started) == 4)


def test_missing_nodes_are_named_after_the_longest_wait(config, started):
    cluster = Cluster(config)
    with cluster.leader(limit_s=0.0) as leader:
        obstacle = leader.ready()
    assert obstacle is not None
    assert obstacle.kind is CauseKind.HOST_WAIT
    assert "node 1" in obstacle.text
    assert obstacle.exit_code is ExitCode.LOST_PEER
    cluster.follow(limit_s=0.0).join(WAIT_S)
    assert cluster.status is ExitCode.LOST_PEER
    assert f"node 0 at 127.0.0.1:{cluster.port}" in cluster.console.getvalue()


def test_node_of_another_size_of_job_is_rejected(config, started):
    cluster = Cluster(config)
    thread = cluster.follow(num_nodes=3)
    with cluster.leader() as leader:
        threading.Thread(target=leader.ready, daemon=True).start()
        thread.join(WAIT_S)
        assert cluster.status is ExitCode.USER
        assert "--nodes 2" in cluster.console.getvalue()
        cluster.preemption.requested = True


def test_node_with_another_secret_takes_no_place_and_stops_nothing(config, started, tmp_path):
    cluster = Cluster(config)
    cluster.follow()
    with cluster.leader() as leader:
        assert leader.ready() is None
        job = leader.start(tmp_path)
        until(lambda: len(started) == 2)
        link = leader._hub.links[1]
        stranger = Cluster(config)
        stranger.port = cluster.port
        stranger.follow(secret="t" * 16).join(WAIT_S)
        assert stranger.status is ExitCode.USER
        assert "MOA_DIST_JOB_SECRET" in stranger.console.getvalue()
        assert leader._hub.links == {1: link}
        assert not job.wait(0.0)
        assert not any(ranks.was_preempted for ranks in started)
        assert link.lost is None
        job.end()
    assert SECRET not in cluster.console.getvalue() + repr(cluster.node(0))


def test_taken_port_is_an_error_with_a_remedy(config, started):
    cluster = Cluster(config)
    with cluster.leader(), pytest.raises(ClusterError, match=f"{cluster.port}.*--master-port"):
        cluster.leader()
