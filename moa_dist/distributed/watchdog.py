"""Reports which rank the others are waiting for, when a step takes too long or on `moa-dist hang`.

A thread on every rank watches the steps, so it can report while the main thread is blocked. The
ranks communicate through the heartbeat connections: a rank whose step is overdue notifies rank 0,
which requests a report from all ranks; each writes the stacks of its threads into the run's folder
and answers with its status, and rank 0 prints which rank the others are waiting for. If a step was
overdue, the job then ends, and a supervisor restarts it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.distributed.heartbeat import Heartbeat
from moa_dist.distributed.rank_status import (
    RankStatus,
    all_stacks,
    own_status,
    progress,
    summary,
)
from moa_dist.errors import ExitCode

FOLDER = "hangs"
"""Subfolder of the run that holds a folder per report, and `REQUEST`."""
REQUEST = "request"
"""Creating this file requests a report; rank 0 removes it."""
SUMMARY = "summary.txt"
"""File in a report's folder that is written last."""
_POLL_S = 0.5
_ANSWER_S = 5.0
"""Longest wait for the answers of the other ranks."""
WATCH_S = 10.0
"""Longest time between the two looks of a report that was requested."""
_MAX_CHARS = 2000
"""Maximum length of the message that every rank prints when it ends."""


class Watchdog:
    """Watches the steps of this rank; on rank 0 it also handles requests for reports."""

    def __init__(
        self,
        heartbeat: Heartbeat | None,
        comm_timer: CommTimer,
        run_folder: Path,
        *,
        limit_s: float | None,
        world_size: int = 1,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        """Start watching.

        Args:
            heartbeat: Connections to the other ranks; None in a job of one rank.
            comm_timer: Knows the collective that this rank is in.
            run_folder: The run's folder, visible to all ranks.
            limit_s: Seconds that a step may take; None for no limit.
            world_size: Number of ranks.
            say: Prints rank 0's report.
        """
        self._heartbeat, self._comm_timer, self._say = heartbeat, comm_timer, say
        self._rank = 0 if heartbeat is None else heartbeat.rank
        self._others = set(range(world_size)) - {self._rank}
        self._folder = run_folder / FOLDER
        self._limit_s = limit_s
        self._step: tuple[int, float] | None = None
        self._resumed = 0.0
        """When this process resumed after being stopped; that time does not count for a step."""
        self._notified = False
        self._is_overdue_elsewhere = False
        self._num_steps = 0
        """Steps begun by this process."""
        self._longest_s = 0.0
        """The longest of those that have ended."""
        self._closing = threading.Event()
        if self._rank == 0:  # left over from a job that has ended
            (self._folder / REQUEST).unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def arm(self, step: int) -> None:
        """Mark the start of a step (counted from 1), before its data is read."""
        self._step = (step, time.monotonic())
        self._num_steps += 1

    def disarm(self) -> None:
        """Mark that no step is running; validation and checkpoints have no time limit."""
        if self._step is not None:
            self._longest_s = max(self._longest_s, time.monotonic() - self._step[1])
        self._step = None

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self._thread.join(timeout=2 * _ANSWER_S)

    def _run(self) -> None:
        polled = time.monotonic()
        while not self._closing.wait(_POLL_S):
            now = time.monotonic()
            if now - polled > 10 * _POLL_S:
                self._resumed = now
            polled = now
            overdue = self._is_overdue(now)
            for message in self._received():
                if "report" in message:
                    self._answer(str(message["report"]))
                overdue |= "overdue" in message
            overdue |= self._is_overdue_elsewhere
            if self._rank != 0:
                if overdue and not self._notified:
                    self._notified = True
                    self._send({"overdue": self._rank})
            elif overdue:
                self._report(is_end=True)
                return
            elif (self._folder / REQUEST).exists():
                self._report(is_end=False)
                polled = time.monotonic()

    def _is_overdue(self, now: float) -> bool:
        step, limit = self._step, self._limit_s
        if step is None or limit is None:
            return False
        return now - max(step[1], self._resumed) > limit

    def _report(self, *, is_end: bool) -> None:
        name = self._new_name()
        (self._folder / REQUEST).unlink(missing_ok=True)
        first, lines = self._conclude_at_once(name) if is_end else self._compare_two_looks(name)
        text = f"{first}\n{lines}\nstacks of all threads: {self._folder / name}/rank-*.txt"
        self._say(text)
        with suppress(OSError):  # a full disk must not keep the job from ending
            partial = self._folder / name / f"{SUMMARY}.partial"
            partial.write_text(text + "\n", encoding="utf-8")
            partial.rename(partial.with_name(SUMMARY))
        if not is_end:
            return
        if self._heartbeat is not None:
            self._heartbeat.end_job(first[:_MAX_CHARS])
        else:
            os._exit(ExitCode.LOST_PEER)

    def _conclude_at_once(self, name: str) -> tuple[str, str]:
        """Return which rank the others wait for, as no step has ended in time, and all lines."""
        known = self._look(name)
        found, lines = summary(list(known.values()), self._others - known.keys())
        return f"no step ended within train.step_limit = {self._limit_s:g} s: {found.text}", lines

    def _compare_two_looks(self, name: str) -> tuple[str, str]:
        """Return whether the job goes on, or which rank it waits for, and a line per rank."""
        began, earlier, num_steps = time.monotonic(), self._look(name), self._num_steps
        # A step that has begun and ended meanwhile has passed through all ranks.
        while self._num_steps < num_steps + 2 and time.monotonic() - began < WATCH_S:
            if self._closing.wait(0.05):
                break
        later = self._look(name)
        seconds = time.monotonic() - began
        silent = self._others - later.keys()
        found, lines = summary(list(later.values()), silent)
        if silent:
            return found.text, lines
        if healthy := progress(earlier, later, seconds):
            return healthy, lines
        step, longest = self._step, self._longest_s
        age = 0.0 if step is None else time.monotonic() - step[1]
        if step is not None and age < longest:
            ages = f"this step has taken {age:.0f} s, earlier ones up to {longest:.0f} s"
            return f"no sign of a hang yet: {ages}", lines
        verdict = "stuck" if longest else "stuck, or still in the first step"
        return f"{verdict}: not every rank has moved in {seconds:.0f} s: {found.text}", lines

    def _look(self, name: str) -> dict[int, RankStatus]:
        """Let every rank write its stacks; returns the status of those that answer in time."""
        self._send({"report": name})
        known = {self._rank: self._write_stacks(name)}
        deadline = time.monotonic() + _ANSWER_S
        while self._others - known.keys() and time.monotonic() < deadline:
            time.sleep(0.05)
            for message in self._received():
                self._is_overdue_elsewhere |= "overdue" in message
                if "status" in message:
                    status = RankStatus(**message["status"])
                    known[status.rank] = status
        return known

    def _new_name(self) -> str:
        now = name = time.strftime("%Y%m%d-%H%M%S")
        number = 1
        while (self._folder / name).exists():
            number += 1
            name = f"{now}-{number}"
        return name

    def _answer(self, name: str) -> None:
        self._send({"status": asdict(self._write_stacks(name))})

    def _write_stacks(self, name: str) -> RankStatus:
        step = self._step
        status = own_status(self._rank, step and step[0], self._comm_timer.progress)
        folder = self._folder / Path(name).name
        text = f"{status}\n\n{all_stacks()}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank-{self._rank}.txt").write_text(text, encoding="utf-8")
        return status

    def _send(self, message: dict[str, Any]) -> None:
        if self._heartbeat is not None:
            self._heartbeat.send(message)

    def _received(self) -> list[dict[str, Any]]:
        return [] if self._heartbeat is None else self._heartbeat.received()
