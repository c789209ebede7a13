"""Determines why an attempt ended from what its ranks left: exit codes, signals and logs."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from pathlib import Path

from moa_dist.errors import ExitCode
from moa_dist.launch.record import RankRecord, read_records

_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?((?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b.*)")
_TRACKER = "resource_tracker"
"""Marks lines that Python's resource tracker prints after its parent was killed."""
_PROBLEM = "  - "
"""Begins each line of a list of problems."""
_TAIL_BYTES = 100_000
_EFFECT_S = 5.0
"""If a rank reports a lost peer at least this long before any other rank ends, the peer was
hanging, and was only killed later."""


class CauseKind(StrEnum):
    """The kinds of reasons for which an attempt ends, or cannot start."""

    DONE = "done"
    PREEMPTED = "preempted"
    PREFLIGHT = "preflight"  # the hosts are not fit for the job
    HOST_WAIT = "host_wait"  # a host was unreachable for too long
    NO_RANK = "no_rank"  # the launcher started no rank
    LAUNCHER = "launcher"  # the launcher reported a problem, such as a host that is gone
    ORPHANED = "orphaned"  # the launcher on the rank's host is gone
    VANISHED = "vanished"  # the rank and its agent are gone without a trace
    KILLED = "killed"  # by a signal from outside the job
    KILLED_OR_MEMORY = "killed_or_memory"  # by SIGKILL, which the kernel may have sent
    HOST_MEMORY = "host_memory"  # the kernel killed the rank to free host memory
    CRASHED = "crashed"  # by a signal that a program causes itself, such as SIGSEGV
    GPU_MEMORY = "gpu_memory"
    DISK_FULL = "disk_full"
    USER = "user"  # an error in the configuration, the data or the devices
    STOPPED = "stopped"  # as the policy for bad steps or failed checkpoints demands
    LOST_PEER = "lost_peer"
    FAILED = "failed"  # an unexpected error


_LOST = (
    CauseKind.ORPHANED,
    CauseKind.VANISHED,
    CauseKind.KILLED,
    CauseKind.KILLED_OR_MEMORY,
    CauseKind.LOST_PEER,
)
"""Causes that lie outside of the rank at fault: the job has lost it."""


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended."""

    kind: CauseKind
    """The kind of reason."""
    text: str
    """Explanation in one line."""
    exit_code: ExitCode
    """The job's exit code. A supervisor restarts after DEFECT and LOST_PEER."""
    rank: int | None = None
    """The rank that caused it, if known."""

    @property
    def is_final(self) -> bool:
        """Whether the supervisor must not restart: it would not help, or is up to the cluster."""
        return self.exit_code not in (ExitCode.DEFECT, ExitCode.LOST_PEER)


def find_cause(folder: Path, problem: str | None = None) -> Cause:
    """Explain the attempt whose records and logs are in `folder`; all its ranks have ended.

    `problem` is what the launcher reports, such as a host that is gone. It counts if no rank has a
    better explanation.
    """
    records = read_records(folder)
    if not records:
        if problem is not None:
            return Cause(CauseKind.LAUNCHER, problem, ExitCode.DEFECT)
        text = f"no rank was started: {_last_line(folder / 'launcher.log')}"
        return Cause(CauseKind.NO_RANK, text, ExitCode.DEFECT)
    if {record.status for record in records} == {ExitCode.DONE}:
        return Cause(CauseKind.DONE, "done", ExitCode.DONE)
    if all(_ended_well(record) for record in records):
        text = "preempted: saved; run the same command to continue"
        return Cause(CauseKind.PREEMPTED, text, ExitCode.PREEMPTED)
    culprit = _culprit(records)
    if problem is not None and (culprit.orphaned or culprit.status is None):
        return Cause(CauseKind.LAUNCHER, problem, ExitCode.LOST_PEER)
    kind, text = _explain(culprit, folder)
    who = f"rank {culprit.rank} (host {culprit.host})"
    return Cause(kind, f"{who} {text}", _exit_code(kind, culprit), culprit.rank)


def _culprit(records: list[RankRecord]) -> RankRecord:
    """Return the rank that ended first, ignoring those that ended because another one did."""
    bad = [record for record in records if not _ended_well(record)]
    first = min(bad, key=_when)
    own = [r for r in bad if r.status != ExitCode.LOST_PEER and not r.orphaned]
    culprit = min(own, key=_when, default=first)
    if _when(culprit) > _when(first) + _EFFECT_S:
        culprit = first
    # If the network is split, each side misses the other; believe rank 0's side, which continues.
    if culprit.status == ExitCode.LOST_PEER and bad[0].rank == 0:
        return bad[0] if bad[0].status == ExitCode.LOST_PEER else culprit
    return culprit


def _ended_well(record: RankRecord) -> bool:
    """Return whether a rank ended as it was asked to; an orphan may have saved, but must go on."""
    return record.status in (ExitCode.DONE, ExitCode.PREEMPTED) and not record.orphaned


def _when(record: RankRecord) -> float:
    """Return the time at which a rank ended.

    A missing time sorts last: the rank's agent was killed, usually by a launcher that gave up.
    """
    return math.inf if record.ended is None else record.ended


def _exit_code(kind: CauseKind, record: RankRecord) -> ExitCode:
    """Return the job's exit code: that of the rank, if it is one of those it chooses itself."""
    if kind in _LOST:
        return ExitCode.LOST_PEER
    reported = (ExitCode.USER, ExitCode.NOT_FINITE, ExitCode.NOT_SAVED)
    return ExitCode(record.status) if record.status in reported else ExitCode.DEFECT


def _explain(record: RankRecord, folder: Path) -> tuple[CauseKind, str]:
    log = folder / record.log
    status = record.status
    if record.orphaned:
        return CauseKind.ORPHANED, "was ended because the launcher on its host is gone"
    if status is None:
        return CauseKind.VANISHED, "vanished together with its agent"
    if status < 0:
        return _explain_signal(record, log)
    if status == ExitCode.USER:
        return CauseKind.USER, f"found a configuration or data error: {_last_problems(log)}"
    if status in (ExitCode.NOT_FINITE, ExitCode.NOT_SAVED):
        return CauseKind.STOPPED, f"stopped: {_last_line(log)}"
    if status == ExitCode.LOST_PEER:
        prefix = f"rank {record.rank}: "
        lines = reversed(last_lines(log, 50))
        report = next((line for line in lines if line.startswith(prefix)), _last_line(log))
        return CauseKind.LOST_PEER, f"lost a peer: {report.removeprefix(prefix)}"
    error = _last_error(log) or f"exit code {status}: {_last_line(log)}"
    if "OutOfMemoryError" in error or "CUDA out of memory" in error:
        hint = "halve train.micro_batch, or set train.recompute"
        return CauseKind.GPU_MEMORY, f"ran out of GPU memory ({hint}): {error[:300]}"
    if "No space left on device" in error:
        return CauseKind.DISK_FULL, f"found the disk full: {error}"
    return CauseKind.FAILED, f"failed: {error}"


def _explain_signal(record: RankRecord, log: Path) -> tuple[CauseKind, str]:
    assert record.status is not None
    number = -record.status
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    text = f"was killed by {name}"
    if number == signal.SIGKILL and record.oom_kills:
        hint = "use fewer data.workers"
        return CauseKind.HOST_MEMORY, f"{text}: the kernel was out of host memory ({hint})"
    if number == signal.SIGKILL and record.oom_kills is None:
        text += ", either from outside the job or by a kernel out of memory (see `dmesg`)"
        return CauseKind.KILLED_OR_MEMORY, text
    if number == signal.SIGKILL:
        return CauseKind.KILLED, f"{text} from outside the job; not out of memory"
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE):
        return CauseKind.CRASHED, f"{text}: {_last_line(log)}"
    return CauseKind.KILLED, text


def count_oom_kills() -> int | None:
    """Return how many processes of this one's control group the kernel killed for lack of memory.

    Returns None where that cannot be read.
    """
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":
                root, file = Path("/sys/fs/cgroup"), "memory.events"
            elif "memory" in controllers.split(","):
                root, file = Path("/sys/fs/cgroup/memory"), "memory.oom_control"
            else:
                continue
            for folder in (root / group.lstrip("/"), root):  # a container sees its group as root
                with suppress(OSError):
                    values = dict(x.split() for x in (folder / file).read_text().splitlines())
                    return int(values["oom_kill"])
    return None


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a log; empty if the file does not exist."""
    with suppress(OSError):
        return list(_lines(path))[-count:]
    return []


def _last_line(path: Path) -> str:
    return next(reversed(_output(path)), "(no output)")


def _last_problems(path: Path) -> str:
    """Return all problems of the list that ends a log, or its last line if it ends with none."""
    problems = takewhile(lambda line: line.startswith(_PROBLEM), reversed(_output(path)))
    texts = [line.removeprefix(_PROBLEM) for line in problems]
    return "; ".join(reversed(texts)) or _last_line(path)


def _output(path: Path) -> list[str]:
    return [line for line in last_lines(path, 50) if line.strip() and _TRACKER not in line]


def _last_error(path: Path) -> str | None:
    """Return the message of the last traceback."""
    for line in reversed(last_lines(path, 200)):
        if match := _ERROR.match(line):
            return match[1]
    return None


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        yield from file.read().decode(errors="replace").splitlines()
