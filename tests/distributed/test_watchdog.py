"""A job that hangs says which rank the others wait for, and ends; or says so when it is asked."""

import re
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

import moa_dist.distributed.watchdog
from moa_dist.cli import hang
from moa_dist.cli.main import main
from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.distributed.heartbeat import Heartbeat
from moa_dist.distributed.mesh import make_mesh
from moa_dist.distributed.rank_status import RankStatus, progress, summary
from moa_dist.distributed.watchdog import FOLDER, SUMMARY, Watchdog
from moa_dist.errors import ExitCode, PeerErrorKind
from moa_dist.models.language_model import build_model
from moa_dist.models.objective import Batch, objective
from moa_dist.moe.sharding import shard_experts
from tests.distributed.test_heartbeat import WAIT_S, Limits, Ranks
from tests.observe.reports import make_config

LIMIT_S = 2.0


def begin_and_oversleep(watchdog: Watchdog, rank: int, *_: object) -> None:
    """The step begins in the layer: what came before may take any time."""
    watchdog.arm(12)
    if rank == 1:
        time.sleep(10 * WAIT_S)


def sleep_in_layer_3_of_rank_1(rank: int, beat: Heartbeat, folder: Path) -> None:
    mesh = make_mesh(2)
    config = make_config("dense").model.model_copy(update={"num_layers": 4})
    config = config.model_copy(update={"num_distinct_layers": 4})
    model = build_model(config, seed=0, parallelize=partial(shard_experts, mesh=mesh))
    watchdog = Watchdog(beat, mesh.comm_timer, folder, limit_s=LIMIT_S, world_size=2)
    hook = partial(begin_and_oversleep, watchdog, rank)
    model.stack.layers[3].ffn.router.register_forward_pre_hook(hook)
    objective(model, Batch(torch.full((2, 9), rank))).loss(16).backward()
    watchdog.close()


def test_the_rank_that_hangs_is_named_with_its_collective(tmp_path):
    body = partial(sleep_in_layer_3_of_rank_1, folder=tmp_path)
    patience = Limits(silence_s=WAIT_S, collective=timedelta(seconds=WAIT_S))
    ranks = Ranks(tmp_path, body, world_size=2, limits=patience)
    assert ranks.wait([0, 1]) == [ExitCode.LOST_PEER] * 2, ranks.said()
    (report,) = (tmp_path / FOLDER).iterdir()
    first, *each, _ = (report / SUMMARY).read_text().splitlines()
    assert "train.step_limit = 2 s" in first
    assert each[1] in first
    assert each[0] not in first
    assert each[0].startswith("rank 0 (host ")
    assert each[1].startswith("rank 1 (host ")
    assert all(re.search(r"\bstep 12\b", line) for line in each)
    assert "plan of stack.layers.3.ffn, forward" in each[0]
    assert "combine of stack.layers.2.ffn, forward" in each[1]
    places = re.compile(r"(\S+\.py):\d+")
    assert places.findall(each[0]) == ["distributed_c10d.py", "distributed/collectives.py"]
    assert places.findall(each[1]) == ["test_watchdog.py", "models/feed_forward.py"]
    assert "begin_and_oversleep" in each[1]
    assert "time.sleep" in (report / "rank-1.txt").read_text()
    assert "thread heartbeat" in (report / "rank-0.txt").read_text()
    for rank, text in enumerate(ranks.said()):
        assert ranks.kind(rank) is PeerErrorKind.STUCK
        assert f"rank {rank}: {first}" in text
        assert "Traceback" not in text


def test_a_job_whose_steps_go_on_is_healthy(tmp_path, capsys):
    """Whatever it is doing at the moment of a look."""
    comm_timer, ended = CommTimer(), Event()
    watchdog = Watchdog(None, comm_timer, tmp_path, limit_s=None, say=lambda _: None)

    def take_steps() -> None:
        step = 0
        while not ended.wait(0.1):
            step += 1
            watchdog.arm(step)
            with comm_timer.begin("losses"):
                time.sleep(0.1)
            watchdog.disarm()

    steps = Thread(target=take_steps)
    steps.start()
    assert main(["hang", str(tmp_path)]) == 0
    ended.set()
    steps.join()
    assert capsys.readouterr().out.startswith("healthy: ")
    watchdog.close()


def test_a_step_no_longer_than_earlier_ones_is_no_hang(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(moa_dist.distributed.watchdog, "WATCH_S", 0.2)
    watchdog = Watchdog(None, CommTimer(), tmp_path, limit_s=None, say=lambda _: None)
    watchdog.arm(1)
    watchdog._step = (1, time.monotonic() - 1000.0)  # as if it had taken so long
    watchdog.disarm()
    watchdog.arm(2)
    assert main(["hang", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no sign of a hang yet: ")
    watchdog.close()


def test_progress_needs_every_rank_to_move():
    earlier = {rank: status(rank, 9, inside=True) for rank in (0, 1)}
    half = {0: status(0, 10, inside=True), 1: status(1, 9, inside=False)}
    whole = {rank: status(rank, 12, inside=True) for rank in (0, 1)}
    assert progress(earlier, half, 2.0) is None
    assert progress(earlier, earlier, 2.0) is None
    assert progress(earlier, whole, 2.0)


def test_a_running_job_answers_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(moa_dist.distributed.watchdog, "WATCH_S", 0.2)
    said: list[str] = []
    comm_timer = CommTimer()
    watchdog = Watchdog(None, comm_timer, tmp_path, limit_s=None, say=said.append)
    watchdog.arm(7)
    with comm_timer.begin("losses"):
        assert main(["hang", str(tmp_path)]) == 0
    answer = capsys.readouterr().out
    assert re.search(r"\bstep 7\b.*\bcollective 1, losses\b.* cli/hang\.py:\d", answer)
    assert answer.startswith("stuck, or still in the first step: ")
    assert said == [answer.rstrip("\n")]
    watchdog.close()
    monkeypatch.setattr(hang, "_TAKEN_S", 0.3)
    assert main(["hang", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert main(["hang", str(tmp_path / "absent")]) == 2


def status(rank: int, begun: int, inside: bool) -> RankStatus:
    return RankStatus(rank, "a", 3, begun, "losses", inside, 60.0, "x.py:1 f")


@pytest.mark.parametrize(
    ("known", "silent", "kind", "culprits"),
    [
        # On GPUs the host waits outside of the collective that it began.
        ([(0, 9, False), (1, 8, False)], [], "behind", (1,)),
        ([(0, 9, True), (1, 9, False)], [], "past", (1,)),
        ([(0, 9, True), (1, 9, True)], [], "waiting", ()),
        ([(0, 9, False), (1, 9, False)], [], "slow", ()),
        ([(0, 9, True), (2, 9, True)], [1], "silent", (1,)),
        ([(0, 9, True)], [1, 2], "silent", (1, 2)),
        ([(0, 9, True)], [], "alone", ()),
    ],
)
def test_whom_the_others_wait_for(known, silent, kind, culprits):
    statuses = [status(*values) for values in known]
    conclusion, lines = summary(statuses, silent)
    assert (conclusion.kind, conclusion.ranks) == (kind, culprits)
    named = re.match(r"ranks? (\d+(?:, \d+)*)", conclusion.text)
    shown = tuple(map(int, named[1].split(", "))) if named else ()
    assert shown == (culprits if kind != "alone" else (0,))
    assert lines.splitlines() == [str(each) for each in statuses]


def test_a_status_shows_whether_its_rank_is_in_a_collective():
    assert str(status(0, 9, True)) != str(status(0, 9, False))
    assert "collective 9, losses" in str(status(0, 9, True))
    assert not re.search(r"collective \d", str(status(0, 0, False)))
