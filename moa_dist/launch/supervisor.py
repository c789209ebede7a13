"""Starting a job again until it is done: watch an attempt, say why it ended, decide, wait, go on.

Knows ranks by the records and logs that they leave in the attempt's folder, and a launcher that
starts them; so it serves every launcher whose ranks see the run's folder.
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
from moa_dist.launch.failure import Cause, find_cause, last_lines

ATTEMPTS_FILE = "attempts.jsonl"
"""In the run's folder: one line per attempt."""
_POLL_S = 0.2
_SAVE_S = 900.0
"""Longest wait for a job that was asked to stop; a collective that hangs takes ten minutes."""
_MAX_WAIT_S = 300.0
_SHOWN_LINES = 20


class Attempt(Protocol):
    """A job that was started."""

    @property
    def problem(self) -> str | None:
        """What the launcher knows of why it ends, such as a host that is gone."""

    def wait(self, timeout_s: float) -> bool:
        """Whether every process of it has ended; waits for it that long."""

    def preempt(self) -> None:
        """Ask it to save and end."""

    def end(self) -> None:
        """End every process of it; returns when they have ended."""


class Launcher(Protocol):
    """A way to start ranks."""

    def ready(self) -> Cause | None:
        """Wait until an attempt can be started; returns why none can, None if one can."""

    def start(self, folder: Path) -> Attempt:
        """Start an attempt, given its folder."""


@dataclass(frozen=True)
class RestartPolicy:
    """When to give up."""

    max_restarts: int = 3
    """Restarts in a row without a new checkpoint."""
    first_wait_s: float = 1.0
    """Before the first restart of a row; doubles each time, up to five minutes."""

    def wait_s(self, restarts: int) -> float:
        """Seconds to wait before restart number `restarts` (from 1) of a row."""
        return float(min(self.first_wait_s * 2 ** (restarts - 1), _MAX_WAIT_S))


def supervise(
    config: Config,
    launcher: Launcher,
    policy: RestartPolicy,
    preemption: Preemption,
    console: TextIO,
) -> ExitCode:
    """Run attempts, one after the other, until one ends the job.

    Returns what the last attempt came to. Ends no attempt's ranks but its own.
    """
    run = run_folder(config)
    restarts = 0
    while True:
        if (hindrance := launcher.ready()) is not None:
            print(hindrance.text, file=console, flush=True)
            return hindrance.exit_code
        number, folder = _new_folder(run / "logs")
        before = _newest_step(run)
        began = datetime.now(UTC)
        cause = _watch(folder, launcher.start(folder), preemption, console)
        after = _newest_step(run)
        restarts = 1 if after > before else restarts + 1
        if preemption.requested and not cause.is_final:
            # Ranks that had not begun to listen died of the signal.
            cause = Cause(f"preempted; then {cause.text}", ExitCode.PREEMPTED, cause.rank)
        gives_up = not cause.is_final and restarts > policy.max_restarts
        wait_s = 0.0 if cause.is_final or gives_up else policy.wait_s(restarts)
        if cause.exit_code is not ExitCode.DONE:
            _show(folder, cause, console)
        _record(
            run / ATTEMPTS_FILE,
            console,
            attempt=number,
            began=began.isoformat(timespec="seconds"),
            seconds=round((datetime.now(UTC) - began).total_seconds(), 1),
            checkpoint_before=before,
            checkpoint_after=after,
            cause=cause.text,
            rank=cause.rank,
            exit_code=cause.exit_code.name.lower(),
            restarts=not (cause.is_final or gives_up),
        )
        if cause.is_final or gives_up:
            if gives_up:
                times = f"{policy.max_restarts} restarts without a new checkpoint"
                print(f"giving up after {times}; logs are in {folder.parent}", file=console)
            return cause.exit_code
        print(
            f"restart {restarts} of {policy.max_restarts} in {wait_s:g} s, after step {after}",
            file=console,
            flush=True,
        )
        if _sleep(wait_s, preemption):
            return ExitCode.PREEMPTED


def _watch(folder: Path, attempt: Attempt, preemption: Preemption, console: TextIO) -> Cause:
    """Until all ranks have ended; shows rank 0's output meanwhile."""
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
    """Print what a file, which may not exist yet, holds beyond `offset`; returns its new end."""
    if not path.exists():
        return offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    complete = data.rfind(b"\n") + 1  # also keeps characters whole
    console.write(data[:complete].decode(errors="replace"))
    console.flush()
    return offset + complete


def _show(folder: Path, cause: Cause, console: TextIO) -> None:
    """The last lines of the rank whose fault it was, unless they were shown, then the cause."""
    if cause.rank:
        path = folder / f"rank-{cause.rank}.log"
        print(f"--- the end of {path}", file=console)
        for line in last_lines(path, _SHOWN_LINES):
            print(line, file=console)
        print("---", file=console)
    print(f"{folder.name}: {cause.text}", file=console, flush=True)


def _new_folder(logs: Path) -> tuple[int, Path]:
    """Attempts are counted over the whole run, also when the supervisor was started again."""
    used = [re.fullmatch(r"attempt-(\d+)", path.name) for path in logs.glob("attempt-*")]
    number = max((int(match[1]) for match in used if match), default=0) + 1
    folder = logs / f"attempt-{number:02d}"
    folder.mkdir(parents=True)
    return number, folder


def _newest_step(run: Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoints(run)), default=0)


def _record(path: Path, console: TextIO, **values: object) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk: the job's own end is not to be lost with it
        print(f"{path}: this attempt is not recorded: {error.strerror}", file=console)


def _sleep(seconds: float, preemption: Preemption) -> bool:
    """Whether the supervisor was asked to stop meanwhile."""
    end = time.monotonic() + seconds
    while not preemption.requested and time.monotonic() < end:
        time.sleep(min(_POLL_S, seconds))
    return preemption.requested
