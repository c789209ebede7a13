"""A rank that dies, stops or fails ends all others, which name it; and nothing else does."""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from moa_dist.distributed.heartbeat import Heartbeat, heartbeat
from moa_dist.errors import ExitCode, PeerError, PeerErrorKind
from tests.distributed.pool import _free_port

WAIT_S = 60
SILENCE_S = 3.0


class Limits(NamedTuple):
    silence_s: float = SILENCE_S
    collective: timedelta = timedelta(seconds=10)


QUICK = Limits()


def _rank_main(rank: int, world_size: int, port: int, folder: Path, limits, body) -> None:
    import torch.distributed as dist

    os.environ["MASTER_ADDR"] = "127.0.0.1"
    error = os.open(folder / f"rank-{rank}.err", os.O_CREAT | os.O_WRONLY)
    os.dup2(error, sys.stderr.fileno())
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=limits.collective
    )
    try:
        with heartbeat(torch.device("cpu"), silence_s=limits.silence_s) as beat:
            threading.Thread(target=_record_failure, args=(beat, folder), daemon=True).start()
            (folder / f"rank-{rank}.joined").touch()
            body(rank, beat)
    except PeerError as lost:
        (folder / f"rank-{rank}.kind").write_text(lost.kind)
        print(f"rank {rank}: {lost}", file=sys.stderr, flush=True)
        os._exit(ExitCode.LOST_PEER)


def _record_failure(beat: Heartbeat, folder: Path) -> None:
    """Write the failure's kind for a main thread that hangs, so that its process is ended."""
    while beat.failure is None:
        time.sleep(0.02)
    (folder / f"rank-{beat.rank}.kind").write_text(beat.failure.kind)


class Ranks:
    """Three ranks that run `body`."""

    def __init__(self, folder: Path, body, world_size: int = 3, limits=QUICK) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "moa_dist.distributed.heartbeat"])
        self.folder, port = folder, _free_port()
        self.processes = [
            context.Process(target=_rank_main, args=(r, world_size, port, folder, limits, body))
            for r in range(world_size)
        ]
        for process in self.processes:
            process.start()
        deadline = time.monotonic() + WAIT_S
        while len(list(folder.glob("*.joined"))) < world_size:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait(self, ranks: list[int]) -> list[int | None]:
        """Exit codes; all ranks are gone afterwards."""
        for rank in ranks:
            self.processes[rank].join(WAIT_S)
        codes = [self.processes[rank].exitcode for rank in ranks]
        for process in self.processes:
            process.kill()
            process.join(WAIT_S)
        return codes

    def said(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("*.err"))]

    def kind(self, rank: int) -> PeerErrorKind:
        """What a rank knew to have happened to the one that was lost."""
        return PeerErrorKind((self.folder / f"rank-{rank}.kind").read_text())


def hang(rank: int, beat: Heartbeat | None = None) -> None:
    """As in a collective of NCCL that nobody else enters."""
    time.sleep(10 * WAIT_S)


def reduce_for_ever(rank: int, beat: Heartbeat | None = None) -> None:
    while True:
        torch.distributed.all_reduce(torch.ones(1))


def stay_longer_than_others(rank: int, beat: Heartbeat | None = None) -> None:
    """Silent in the main thread for longer than a beat may be missing; leaves one by one."""
    time.sleep(SILENCE_S * (1.5 + 0.3 * rank))


def stay_away_on_rank_1(rank: int, beat: Heartbeat | None = None) -> None:
    if rank == 1:
        hang(rank)
    reduce_for_ever(rank)


def fail_on_rank_1(rank: int, beat: Heartbeat | None = None) -> None:
    if rank == 1:
        raise ValueError("wrong number")
    reduce_for_ever(rank)


def named(text: str) -> set[int]:
    """Ranks that a message names."""
    return set(map(int, re.findall(r"\brank (\d+)", text)))


@pytest.mark.parametrize("body", [hang, reduce_for_ever])
@pytest.mark.parametrize("victim", [0, 2])
def test_killed_rank_ends_the_others_which_name_it(tmp_path, body, victim):
    ranks = Ranks(tmp_path, body)
    ranks.signal(victim, signal.SIGKILL)
    others = [r for r in range(3) if r != victim]
    assert ranks.wait(others) == [ExitCode.LOST_PEER] * 2, ranks.said()
    for rank in others:
        text = ranks.said()[rank]
        assert named(text) == {rank, victim}
        assert ranks.kind(rank) is PeerErrorKind.DEAD
        assert "Traceback" not in text


@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_rank_ends_the_others_which_name_it(tmp_path, victim):
    ranks = Ranks(tmp_path, hang)
    ranks.signal(victim, signal.SIGSTOP)
    others = [r for r in range(3) if r != victim]
    assert ranks.wait(others) == [ExitCode.LOST_PEER] * 2, ranks.said()
    for rank in others:
        assert named(ranks.said()[rank]) == {rank, victim}
        assert ranks.kind(rank) is PeerErrorKind.SILENT


def test_failing_rank_tells_the_others_why(tmp_path):
    ranks = Ranks(tmp_path, fail_on_rank_1)
    assert ranks.wait([0, 1, 2]) == [ExitCode.LOST_PEER, ExitCode.DEFECT, ExitCode.LOST_PEER]
    for rank in (0, 2):
        assert named(ranks.said()[rank]) == {rank, 1}
        assert ranks.kind(rank) is PeerErrorKind.FAILED
        assert "ValueError: wrong number" in ranks.said()[rank]


def test_collective_that_a_living_rank_never_enters_ends_all(tmp_path):
    ranks = Ranks(tmp_path, stay_away_on_rank_1)
    assert ranks.wait([0, 1, 2]) == [ExitCode.LOST_PEER] * 3, ranks.said()
    # Of ranks 0 and 2, the second one may hear of the first one's end before its own timeout.
    assert PeerErrorKind.STUCK in (ranks.kind(0), ranks.kind(2))
    assert ranks.kind(1) is PeerErrorKind.FAILED
    assert "RuntimeError" in ranks.said()[1]


def test_busy_ranks_that_leave_at_different_times_alarm_nobody(tmp_path):
    ranks = Ranks(tmp_path, stay_longer_than_others)
    assert ranks.wait([0, 1, 2]) == [0, 0, 0], ranks.said()
