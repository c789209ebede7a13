"""Why an attempt ended, judged by what its ranks left: exit codes, signals, ends of logs."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moa_dist.errors import ExitCode
from moa_dist.launch.record import RankRecord, read_records

_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?((?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b.*)")
_TRACKER = "resource_tracker"
"""What Python says, from a process of its own, after one that it served has ended at once."""
_TAIL_BYTES = 100_000
_EFFECT_S = 5.0
"""A rank that reports a lost peer so much before any other ends was the first to know: the other
hung, and was killed for it later."""


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended."""

    text: str
    """One line."""
    exit_code: ExitCode
    """What it comes to. A supervisor tries again after DEFECT and LOST_PEER."""
    rank: int | None = None
    """Whose fault it was, where that is known."""

    @property
    def is_final(self) -> bool:
        """Trying again would change nothing, or is up to the cluster."""
        return self.exit_code not in (ExitCode.DEFECT, ExitCode.LOST_PEER)


def find_cause(folder: Path, problem: str | None = None) -> Cause:
    """Judge the attempt whose records and logs are in `folder`; all its ranks have ended.

    `problem` is what the launcher knows of, such as a host that is gone; it counts where no rank
    has said better.
    """
    records = read_records(folder)
    if not records:
        text = problem or f"no rank was started: {_last_line(folder / 'launcher.log')}"
        return Cause(text, ExitCode.DEFECT)
    codes = {record.status for record in records}
    if codes == {ExitCode.DONE}:
        return Cause("done", ExitCode.DONE)
    if codes <= {ExitCode.DONE, ExitCode.PREEMPTED}:
        return Cause("preempted: saved, to be continued by the same command", ExitCode.PREEMPTED)
    culprit = _culprit(records)
    if problem is not None and (culprit.orphaned or culprit.status is None):
        return Cause(problem, ExitCode.LOST_PEER)
    text, code = _explain(culprit, folder)
    return Cause(f"rank {culprit.rank} (host {culprit.host}) {text}", code, culprit.rank)


def _culprit(records: list[RankRecord]) -> RankRecord:
    """The rank that ended first, without those that ended because another did."""
    bad = [r for r in records if r.status not in (ExitCode.DONE, ExitCode.PREEMPTED)]
    first = min(bad, key=_when)
    own = [r for r in bad if r.status != ExitCode.LOST_PEER and not r.orphaned]
    culprit = min(own, key=_when, default=first)
    if _when(culprit) > _when(first) + _EFFECT_S:
        culprit = first
    # Where the network has parted, each side misses the other; rank 0's is the one that goes on.
    if culprit.status == ExitCode.LOST_PEER and bad[0].rank == 0:
        return bad[0] if bad[0].status == ExitCode.LOST_PEER else culprit
    return culprit


def _when(record: RankRecord) -> float:
    """Without an end: its agent was killed, mostly late, by a launcher that lost patience."""
    return math.inf if record.ended is None else record.ended


def _explain(record: RankRecord, folder: Path) -> tuple[str, ExitCode]:
    log = folder / record.log
    status = record.status
    if record.orphaned:
        return "was ended: the launcher on its host is gone", ExitCode.DEFECT
    if status is None:
        return "vanished together with the process that watched it", ExitCode.DEFECT
    if status < 0:
        return _explain_signal(record, log), ExitCode.DEFECT
    if status == ExitCode.USER:
        return f"found what only you can mend: {_last_line(log)}", ExitCode.USER
    if status in (ExitCode.NOT_FINITE, ExitCode.NOT_SAVED):
        return f"stopped: {_last_line(log)}", ExitCode(status)
    if status == ExitCode.LOST_PEER:
        begin = f"rank {record.rank}: "
        lines = reversed(last_lines(log, 50))
        said = next((line for line in lines if line.startswith(begin)), _last_line(log))
        return f"lost another: {said.removeprefix(begin)}", ExitCode.LOST_PEER
    error = _last_error(log) or f"exit code {status}: {_last_line(log)}"
    if "OutOfMemoryError" in error or "CUDA out of memory" in error:
        hint = "halve train.micro_batch, or set train.recompute"
        return f"ran out of GPU memory ({hint}): {error[:300]}", ExitCode.DEFECT
    if "No space left on device" in error:
        return f"found the disk full: {error}", ExitCode.DEFECT
    return f"failed: {error}", ExitCode.DEFECT


def _explain_signal(record: RankRecord, log: Path) -> str:
    assert record.status is not None
    number = -record.status
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    text = f"was killed by {name}"
    if number == signal.SIGKILL:
        if record.oom_kills:
            text += ": the kernel ended it, out of host memory (use fewer data.workers)"
        elif record.oom_kills == 0:
            text += " from outside; it was not for want of memory"
        else:
            text += ": from outside, or the kernel was out of memory (see `dmesg`)"
    elif number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE):
        text += f": {_last_line(log)}"
    return text


def count_oom_kills() -> int | None:
    """Processes of this one's control group that the kernel ever killed for want of memory."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":
                root, file = Path("/sys/fs/cgroup"), "memory.events"
            elif "memory" in controllers.split(","):
                root, file = Path("/sys/fs/cgroup/memory"), "memory.oom_control"
            else:
                continue
            for folder in (root / group.lstrip("/"), root):  # a container's own group is its root
                with suppress(OSError):
                    values = dict(x.split() for x in (folder / file).read_text().splitlines())
                    return int(values["oom_kill"])
    return None


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log; empty if there is none."""
    with suppress(OSError):
        return list(_lines(path))[-count:]
    return []


def _last_line(path: Path) -> str:
    lines = (line for line in last_lines(path, 50) if line.strip() and _TRACKER not in line)
    return next(reversed(list(lines)), "(no output)")


def _last_error(path: Path) -> str | None:
    """The message of the last traceback."""
    for line in reversed(last_lines(path, 200)):
        if match := _ERROR.match(line):
            return match[1]
    return None


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        yield from file.read().decode(errors="replace").splitlines()
