"""Waits, up to a limit, for hosts that a job has lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from moa_dist.distributed.preemption import Preemption
from moa_dist.errors import ExitCode
from moa_dist.launch.failure import Cause, CauseKind
from moa_dist.launch.preflight import Preflight

HOST_WAIT_S = 600.0
"""Default of the longest wait for a host."""
_RETRY_S = 3.0
_POLL_S = 0.2


class Waiting:
    """Checks the hosts before each attempt, and waits for those that cannot be reached."""

    def __init__(
        self, limit_s: float, preemption: Preemption, console: TextIO, *, from_the_start: bool
    ) -> None:
        """Set the longest wait for hosts that cannot be reached.

        With `from_the_start`, hosts may still be starting before the first attempt; otherwise a
        host that cannot be reached then is an error.
        """
        self.limit_s, self.preemption, self.console = limit_s, preemption, console
        self._may_wait = from_the_start

    def until_fit(self, check: Callable[[], Preflight]) -> Preflight | Cause:
        """Repeat `check` until it finds no fault; returns its result, or why to give up."""
        began = time.monotonic()
        announced: list[str] = []
        while True:
            started = time.monotonic()
            found = check()
            seconds = time.monotonic() - started
            if not found.faults:
                self._may_wait = True
                self._report(found, seconds)
                return found
            lost = found.unreachable
            if not self._may_wait or len(lost) < len(found.faults):
                self._report(found, seconds)
                text = "nothing was started: fix these faults, then try again"
                return Cause(CauseKind.PREFLIGHT, text, ExitCode.USER)
            names = ", ".join(lost)
            if time.monotonic() - began > self.limit_s:
                text = f"gave up waiting for {names} after {self.limit_s:g} s"
                return Cause(CauseKind.HOST_WAIT, text, ExitCode.LOST_PEER)
            if lost != announced:
                self.say(f"waiting up to {self.limit_s:g} s for {names}")
                announced = lost
            if self.sleep(_RETRY_S):
                text = "asked to stop while waiting for hosts"
                return Cause(CauseKind.PREEMPTED, text, ExitCode.PREEMPTED)

    def say(self, text: str) -> None:
        """Print a line on the console."""
        print(text, file=self.console, flush=True)

    def sleep(self, seconds: float) -> bool:
        """Sleep until the time is over or the job is asked to stop; returns whether it was."""
        end = time.monotonic() + seconds
        while not self.preemption.requested and time.monotonic() < end:
            time.sleep(_POLL_S)
        return self.preemption.requested

    def _report(self, found: Preflight, seconds: float) -> None:
        for finding in found.findings:
            self.say(str(finding))
        faults = len(found.faults)
        result = "no faults" if not faults else f"{faults} fault{'s' if faults > 1 else ''}"
        ranks = ", ".join(f"{host.name} ({host.slots})" for host in found.hosts)
        self.say(f"preflight of {ranks or 'no host'} in {seconds:.1f} s: {result}")
