"""Supervises a job: watches an attempt, explains why it ended, and restarts it until it is done.

The supervisor knows a launcher that starts ranks, and reads the records and logs that the ranks
leave in the attempt's folder. It works with every launcher whose ranks share the run's folder.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TextIO

from moa_dist.checkpoint.format import checkpoints
from moa_dist.config.run import Config, run_folder
from moa_dist.distributed.preemption import Preemption
from moa_dist.errors import ExitCode
from moa_dist.launch.failure import Cause, CauseKind, find_cause, last_lines

ATTEMPTS_FILE = "attempts.jsonl"
"""File in the run's folder with one line per attempt."""
_POLL_S = 0.2
_SAVE_S = 900.0
"""Longest wait for a job that was asked to stop; a hanging collective takes ten minutes to fail."""
_MAX_WAIT_S = 300.0
_SHOWN_LINES = 20


class Attempt(Protocol):
    """A job that was started."""

    @property
    def problem(self) -> str | None:
        """What the launcher knows about why the job ends, such as a host that is gone."""

    def wait(self, timeout_s: float) -> bool:
        """Return whether all its processes have ended; waits up to `timeout_s`."""

    def preempt(self) -> None:
        """Ask the job to save and stop."""

    def end(self) -> None:
        """End all its processes, and wait until they have ended."""


class Launcher(Protocol):
    """A way to start ranks."""

    def ready(self) -> Cause | None:
        """Wait until an attempt can start; returns why none can, or None."""

    def start(self, folder: Path) -> Attempt:
        """Start an attempt that writes its logs to `folder`."""


@dataclass(frozen=True)
class RestartPolicy:
    """How often to restart a job, and how long to wait before."""

    max_restarts: int = 3
    """Maximum number of consecutive restarts without a new checkpoint."""
    first_wait_s: float = 1.0
    """Seconds before the first restart; doubles with each consecutive one, up to five minutes."""

    def wait_s(self, restarts: int) -> float:
        """Return the seconds to wait before consecutive restart number `restarts`, from 1."""
        return float(min(self.first_wait_s * 2 ** (restarts - 1), _MAX_WAIT_S))


@dataclass(frozen=True)
class _Outcome:
    """How one attempt ended, and what the supervisor makes of it."""

    folder: Path
    """The attempt's folder."""
    began: datetime
    """When it was started."""
    checkpoints: tuple[int, int]
    """Steps of the newest checkpoint before and after it."""
    cause: Cause
    """Why it ended."""
    restarts: bool
    """Whether another attempt follows."""


def supervise(
    config: Config,
    launcher: Launcher,
    policy: RestartPolicy,
    preemption: Preemption,
    console: TextIO,
) -> ExitCode:
    """Run attempts, one after the other, until the job ends; returns its exit code."""
    run = run_folder(config)
    restarts = 0
    while True:
        if (obstacle := launcher.ready()) is not None:
            print(obstacle.text, file=console, flush=True)
            return obstacle.exit_code
        number, folder = _new_folder(run / "logs")
        before = _newest_step(run)
        began = datetime.now(UTC)
        cause = _watch(folder, launcher.start(folder), preemption, console)
        after = _newest_step(run)
        restarts = 1 if after > before else restarts + 1
        if preemption.requested and not cause.is_final:
            # The signal killed ranks that did not handle it yet.
            text = f"preempted; then {cause.text}"
            cause = Cause(CauseKind.PREEMPTED, text, ExitCode.PREEMPTED, cause.rank)
        may_restart = not cause.is_final and restarts <= policy.max_restarts
        if cause.exit_code is not ExitCode.DONE:
            _show(folder, cause, console)
        outcome = _Outcome(folder, began, (before, after), cause, may_restart)
        _record(run / ATTEMPTS_FILE, console, number, outcome)
        if not may_restart:
            if not cause.is_final:
                times = f"{policy.max_restarts} restarts without a new checkpoint"
                print(f"giving up after {times}; logs are in {folder.parent}", file=console)
            return cause.exit_code
        wait_s = policy.wait_s(restarts)
        count = f"{restarts} of {policy.max_restarts}"
        print(f"restart {count} in {wait_s:g} s, after step {after}", file=console, flush=True)
        if _sleep(wait_s, preemption):
            return ExitCode.PREEMPTED


def _watch(folder: Path, attempt: Attempt, preemption: Preemption, console: TextIO) -> Cause:
    """Wait until all ranks have ended, printing rank 0's output; returns why they ended."""
    deadline, shown = None, 0
    try:
        while not attempt.wait(_POLL_S):
            shown = _copy(folder / "rank-0.log", shown, console)
            if preemption.requested and deadline is None:
                deadline = time.monotonic() + _SAVE_S
                attempt.preempt()
            if deadline is not None and time.monotonic() > deadline:
                break
    finally:
        attempt.end()
    _copy(folder / "rank-0.log", shown, console)
    return find_cause(folder, attempt.problem)


def _copy(path: Path, offset: int, console: TextIO) -> int:
    """Print the complete lines of a file after `offset`; returns the new offset.

    The file may not exist yet.
    """
    if not path.exists():
        return offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    complete = data.rfind(b"\n") + 1  # also avoids splitting characters
    console.write(data[:complete].decode(errors="replace"))
    console.flush()
    return offset + complete


def _show(folder: Path, cause: Cause, console: TextIO) -> None:
    """Print the cause, and before it the last lines of the rank at fault, unless it is rank 0."""
    if cause.rank:
        path = folder / f"rank-{cause.rank}.log"
        print(f"--- last lines of {path}", file=console)
        for line in last_lines(path, _SHOWN_LINES):
            print(line, file=console)
        print("---", file=console)
    print(f"{folder.name}: {cause.text}", file=console, flush=True)


def _new_folder(logs: Path) -> tuple[int, Path]:
    """Create the next attempt's folder; numbers continue when the supervisor is restarted."""
    used = [re.fullmatch(r"attempt-(\d+)", path.name) for path in logs.glob("attempt-*")]
    number = max((int(match[1]) for match in used if match), default=0) + 1
    folder = logs / f"attempt-{number:02d}"
    folder.mkdir(parents=True)
    return number, folder


def _newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint; 0 if none exists."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoints(run)), default=0)


def _record(path: Path, console: TextIO, number: int, outcome: _Outcome) -> None:
    cause = outcome.cause
    values = {
        "attempt": number,
        "began": outcome.began.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - outcome.began).total_seconds(), 1),
        "checkpoint_before": outcome.checkpoints[0],
        "checkpoint_after": outcome.checkpoints[1],
        "kind": cause.kind,
        "cause": cause.text,
        "rank": cause.rank,
        "exit_code": cause.exit_code.name.lower(),
        "restarts": outcome.restarts,
    }
    try:
        with path.open("a") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # on a full disk the job's exit code must not be lost as well
        print(f"{path}: this attempt was not recorded: {error.strerror}", file=console)


def _sleep(seconds: float, preemption: Preemption) -> bool:
    """Sleep until the time is over or the supervisor is asked to stop; returns whether it was."""
    end = time.monotonic() + seconds
    while not preemption.requested and time.monotonic() < end:
        time.sleep(min(_POLL_S, seconds))
    return preemption.requested
