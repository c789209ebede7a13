"""One line that says why a job ended, from its ranks' exit codes, signals and logs."""

from pathlib import Path

import pytest

from moa_dist.errors import ExitCode
from moa_dist.launch.failure import CauseKind, find_cause
from moa_dist.launch.record import RankRecord, write_record


def attempt(
    folder: Path,
    *ranks: tuple[int | None, str],
    orphaned: bool = False,
    oom_kills: int | None = None,
) -> Path:
    """Ranks by status and last line of output, which ended in turn, a second apart."""
    for rank, (status, words) in enumerate(ranks):
        ended = None if status is None else 100.0 + rank
        write_record(folder, RankRecord(rank, "node-a", 7, status, ended, orphaned, oom_kills))
        (folder / f"rank-{rank}.log").write_text(f"step 1\n{words}\n")
    return folder


def traceback(error: str) -> str:
    return f'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\n{error}'


LOST = (ExitCode.LOST_PEER, "rank 0: rank 1 (host node-a) is gone; this rank ends")


@pytest.mark.parametrize(
    ("ranks", "oom_kills", "code", "rank", "kind", "quoted"),
    [
        ([(0, ""), (0, "")], 0, ExitCode.DONE, None, CauseKind.DONE, ""),
        ([(75, ""), (75, "")], 0, ExitCode.PREEMPTED, None, CauseKind.PREEMPTED, ""),
        ([(75, ""), (0, "")], 0, ExitCode.PREEMPTED, None, CauseKind.PREEMPTED, ""),
        ([LOST, (-9, "")], 0, ExitCode.LOST_PEER, 1, CauseKind.KILLED, "SIGKILL"),
        ([LOST, (-9, "")], 1, ExitCode.DEFECT, 1, CauseKind.HOST_MEMORY, "data.workers"),
        ([LOST, (-9, "")], None, ExitCode.LOST_PEER, 1, CauseKind.KILLED_OR_MEMORY, "SIGKILL"),
        (
            [LOST, (-11, "Segmentation")],
            *(0, ExitCode.DEFECT, 1, CauseKind.CRASHED, "SIGSEGV: Segmentation"),
        ),
        (
            [LOST, (None, "")],
            *(0, ExitCode.LOST_PEER, 0, CauseKind.LOST_PEER, "rank 1 (host node-a) is"),
        ),
        ([(None, "")], 0, ExitCode.LOST_PEER, 0, CauseKind.VANISHED, ""),
        ([(None, ""), (-9, "")], 0, ExitCode.LOST_PEER, 1, CauseKind.KILLED, "SIGKILL"),
        (
            [LOST, (2, "a.yaml: 1 problem")],
            *(0, ExitCode.USER, 1, CauseKind.USER, "a.yaml: 1 problem"),
        ),
        (
            [LOST, (2, "run: 2 problems\n  - key is 1\n  - value is 2")],
            *(0, ExitCode.USER, 1, CauseKind.USER, "error: key is 1; value is 2"),
        ),
        (
            [(3, "the loss is not finite")],
            *(0, ExitCode.NOT_FINITE, 0, CauseKind.STOPPED, "the loss is not finite"),
        ),
        (
            [(4, "step-00000004 was not saved")],
            *(0, ExitCode.NOT_SAVED, 0, CauseKind.STOPPED, "step-00000004 was not saved"),
        ),
        ([LOST], 0, ExitCode.LOST_PEER, 0, CauseKind.LOST_PEER, "rank 1 (host node-a) is gone"),
        (
            [LOST, (1, traceback("torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"))],
            *(0, ExitCode.DEFECT, 1, CauseKind.GPU_MEMORY, "train.micro_batch"),
        ),
        (
            [LOST, (1, traceback("OSError: [Errno 28] No space left on device: 'x'"))],
            *(0, ExitCode.DEFECT, 1, CauseKind.DISK_FULL, "OSError"),
        ),
        (
            [LOST, (1, "step-00000004 was not saved: No space left on device")],
            *(0, ExitCode.DEFECT, 1, CauseKind.DISK_FULL, "step-00000004 was not saved"),
        ),
        (
            [LOST, (1, traceback("[rank1]: ValueError: wrong") + "\nwarning: later words")],
            *(0, ExitCode.DEFECT, 1, CauseKind.FAILED, "ValueError: wrong"),
        ),
    ],
)
def test_cause(tmp_path, ranks, oom_kills, code, rank, kind, quoted):
    cause = find_cause(attempt(tmp_path, *ranks, oom_kills=oom_kills))
    assert cause.exit_code is code
    assert cause.rank == rank
    assert cause.kind is kind
    assert quoted in cause.text
    assert "\n" not in cause.text
    assert cause.is_final == (code not in (ExitCode.DEFECT, ExitCode.LOST_PEER))


def test_a_rank_killed_long_after_another_lost_it_was_hanging(tmp_path):
    attempt(tmp_path, LOST)
    write_record(tmp_path, RankRecord(1, "node-a", 8, -9, ended=140.0))
    assert find_cause(tmp_path).kind is CauseKind.LOST_PEER


def test_ranks_without_a_launcher_do_not_blame_each_other(tmp_path):
    cause = find_cause(attempt(tmp_path, (-9, ""), (-9, ""), orphaned=True))
    assert cause.kind is CauseKind.ORPHANED
    assert cause.exit_code is ExitCode.LOST_PEER


def test_an_orphan_that_saved_is_continued(tmp_path):
    cause = find_cause(attempt(tmp_path, (75, ""), (75, ""), orphaned=True))
    assert (cause.kind, cause.exit_code) == (CauseKind.ORPHANED, ExitCode.LOST_PEER)


def test_job_without_ranks_shows_the_launcher_s_output(tmp_path):
    (tmp_path / "launcher.log").write_text("deepspeed: error: no such option\n")
    cause = find_cause(tmp_path)
    assert cause.kind is CauseKind.NO_RANK
    assert cause.text.endswith("deepspeed: error: no such option")


def test_the_launcher_s_problem_counts_if_no_rank_explains_the_end(tmp_path):
    silent = "host node-b has been silent for 32 s"
    assert find_cause(tmp_path, silent).text == silent
    cause = find_cause(attempt(tmp_path, (-9, ""), (None, ""), orphaned=True), silent)
    assert (cause.kind, cause.text) == (CauseKind.LAUNCHER, silent)
    assert cause.exit_code is ExitCode.LOST_PEER
    cause = find_cause(attempt(tmp_path, LOST, (1, traceback("ValueError: wrong"))), silent)
    assert (cause.kind, cause.rank) == (CauseKind.FAILED, 1)
    assert cause.text.startswith("rank 1 (host node-a) ")
    assert cause.text.endswith("ValueError: wrong")


def test_rank_on_a_host_that_is_cut_off_is_named_by_the_others(tmp_path):
    silent = "rank 1 (host node-b) has been silent for 20 s: stopped, or cut off"
    later = "x.py:254: UserWarning: resource_tracker: 11\n  warnings.warn('resource_tracker: %d '"
    output = f"rank 0: {silent}; this rank ends\n{later}"
    attempt(tmp_path, (ExitCode.LOST_PEER, output), (None, ""))
    cause = find_cause(tmp_path, "host node-b has been silent for 32 s")
    assert silent in cause.text
    assert (cause.rank, cause.exit_code) == (0, ExitCode.LOST_PEER)


def test_output_of_python_s_resource_tracker_is_no_reason(tmp_path):
    attempt(
        tmp_path, (2, "a.yaml: 1 problem\nUserWarning: resource_tracker: There appear to be 11")
    )
    assert find_cause(tmp_path).text.endswith("a.yaml: 1 problem")


def test_in_a_split_network_the_side_of_rank_0_is_believed(tmp_path):
    for rank, ended in ((0, 109.0), (1, 101.0)):
        words = f"rank {rank}: rank {1 - rank} (host {'ba'[rank]}) has been silent"
        (tmp_path / f"rank-{rank}.log").write_text(words + "\n")
        write_record(tmp_path, RankRecord(rank, "ab"[rank], 7, ExitCode.LOST_PEER, ended))
    cause = find_cause(tmp_path)
    assert (cause.kind, cause.rank) == (CauseKind.LOST_PEER, 0)
    assert "rank 1 (host b) has been silent" in cause.text
