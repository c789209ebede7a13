"""Who waits for what: asked of all ranks when a step takes too long, or by `moa-dist hang`.

A thread of every rank looks on, so it can speak while the main thread stands still. The ranks talk
through the connections of the heartbeat: who finds its step overdue tells rank 0, which asks all,
each writes the stacks of its threads into the run's folder and answers where it stands, and rank 0
says for whom the others wait. If a step was overdue, the job then ends; a supervisor starts it
again.
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
from moa_dist.distributed.rank_status import RankStatus, all_stacks, own_status, summary
from moa_dist.errors import ExitCode

FOLDER = "hangs"
"""In the run's folder: a folder per report, and `REQUEST`."""
REQUEST = "request"
"""Whoever makes this file asks for a report; rank 0 takes it away."""
SUMMARY = "summary.txt"
"""In the folder of a report, written last."""
_POLL_S = 0.5
_ANSWER_S = 5.0
"""Longest wait for the answers of the other ranks."""
_MOST_TOLD = 2000
"""Characters that every rank says when it ends."""


class Watchdog:
    """Watches the steps of this rank; of rank 0, also for the questions of others."""

    def __init__(
        self,
        beat: Heartbeat | None,
        comm_timer: CommTimer,
        run_folder: Path,
        *,
        limit_s: float | None,
        world_size: int = 1,
        say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        """Begin to watch.

        Args:
            beat: the connections to the other ranks; None if there are none.
            waits: what this rank waits for.
            run_folder: seen by all ranks.
            limit_s: seconds that a step may take; None for any number.
            world_size: number of ranks.
            say: where rank 0 tells what it learned.
        """
        self._beat, self._comm_timer, self._say = beat, comm_timer, say
        self._rank = 0 if beat is None else beat.rank
        self._others = set(range(world_size)) - {self._rank}
        self._folder = run_folder / FOLDER
        self._limit_s = limit_s
        self._step: tuple[int, float] | None = None
        self._resumed = 0.0
        """When this process was found to have been stopped, which no step can help."""
        self._told = False
        self._closing = threading.Event()
        if self._rank == 0:  # asked of a job that has ended since
            (self._folder / REQUEST).unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def begin(self, step: int) -> None:
        """A step, counted from 1, begins with reading its data."""
        self._step = (step, time.monotonic())

    def rest(self) -> None:
        """No step is under way: validation and checkpoints have no limit of their own."""
        self._step = None

    def close(self) -> None:
        """Watch no more."""
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
            for news in self._news():
                if "report" in news:
                    self._answer(str(news["report"]))
                overdue |= "overdue" in news
            if self._rank != 0:
                if overdue and not self._told:
                    self._told = True
                    self._tell({"overdue": self._rank})
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
        self._tell({"report": name})
        known = {0: self._write_stacks(name)}
        deadline = time.monotonic() + _ANSWER_S
        while self._others - set(known) and time.monotonic() < deadline:
            time.sleep(0.05)
            for news in self._news():
                if "standing" in news:
                    status = RankStatus(**news["standing"])
                    known[status.rank] = status
        first, lines = summary(list(known.values()), self._others - set(known))
        if is_end:
            first = f"no step ended within train.step_limit = {self._limit_s:g} s: {first}"
        text = f"{first}\n{lines}\nstacks of all threads: {self._folder / name}/rank-*.txt"
        self._say(text)
        with suppress(OSError):  # a full disk must not keep the job from ending
            partial = self._folder / name / f"{SUMMARY}.partial"
            partial.write_text(text + "\n", encoding="utf-8")
            partial.rename(partial.with_name(SUMMARY))
        if not is_end:
            return
        if self._beat is not None:
            self._beat.end_job(first[:_MOST_TOLD])
        else:
            os._exit(ExitCode.LOST_PEER)

    def _new_name(self) -> str:
        now = name = time.strftime("%Y%m%d-%H%M%S")
        number = 1
        while (self._folder / name).exists():
            number += 1
            name = f"{now}-{number}"
        return name

    def _answer(self, name: str) -> None:
        self._tell({"standing": asdict(self._write_stacks(name))})

    def _write_stacks(self, name: str) -> RankStatus:
        step = self._step
        status = own_status(self._rank, step and step[0], self._comm_timer.progress)
        folder = self._folder / Path(name).name
        text = f"{status}\n\n{all_stacks()}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank-{self._rank}.txt").write_text(text, encoding="utf-8")
        return status

    def _tell(self, news: dict[str, Any]) -> None:
        if self._beat is not None:
            self._beat.tell(news)

    def _news(self) -> list[dict[str, Any]]:
        return [] if self._beat is None else self._beat.news()
