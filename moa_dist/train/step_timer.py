"""How fast training goes, and how much of its time a rank works or waits for others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from moa_dist.distributed.comm_timer import CommTimer


class StepInterval(NamedTuple):
    """Duration of some steps of one rank, without validation and checkpoints."""

    steps: int
    """Number of steps."""
    seconds: float
    """Seconds that they took."""
    waited: float
    """Seconds of those in which the rank waited for others."""


class StepTimer:
    """Measures consecutive intervals of steps."""

    def __init__(self, step: int, comm_timer: CommTimer) -> None:
        self._step, self._since = step, time.monotonic()
        self._comm_timer = comm_timer
        comm_timer.take()
        self._waited = 0.0

    def lap(self, step: int) -> StepInterval:
        """End an interval, which began at the last call or at the start."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        # What a GPU waited for at the end of a lap is known in the next one only.
        waited = min(self._waited + self._comm_timer.take(), seconds)
        lap = StepInterval(max(step - self._step, 1), seconds, waited)
        self._step, self._since, self._waited = step, now, 0.0
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in the block."""
        before = time.monotonic()
        self._waited += self._comm_timer.take()
        yield
        self._comm_timer.take()
        self._since += time.monotonic() - before
