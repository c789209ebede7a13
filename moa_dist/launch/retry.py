"""Waiting, up to a limit, for hosts that a job has lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from moa_dist.distributed.preemption import Preemption
from moa_dist.errors import ExitCode
from moa_dist.launch.failure import Cause
from moa_dist.launch.preflight import Preflight

HOST_WAIT_S = 600.0
"""Longest wait for a host, if nothing else is asked for."""
_AGAIN_S = 3.0
_POLL_S = 0.2


class Waiting:
    """Checks hosts before each attempt."""

    def __init__(
        self, limit_s: float, preemption: Preemption, console: TextIO, *, from_the_start: bool
    ) -> None:
        """`limit_s`: longest wait for hosts that cannot be reached.

        `from_the_start`: hosts come when they are started; else those that are not there before
        the first attempt are a mistake.
        """
        self.limit_s, self.preemption, self.console = limit_s, preemption, console
        self._is_patient = from_the_start

    def until_fit(self, check: Callable[[], Preflight]) -> Preflight | Cause:
        """What `check` finds when nothing is at fault, or why no attempt can start."""
        began = time.monotonic()
        told: list[str] = []
        while True:
            started = time.monotonic()
            found = check()
            seconds = time.monotonic() - started
            if not found.faults:
                self._is_patient = True
                self._report(found, seconds)
                return found
            lost = found.unreachable
            if not self._is_patient or len(lost) < len(found.faults):
                self._report(found, seconds)
                return Cause("nothing was started: mend these, then try again", ExitCode.USER)
            names = ", ".join(lost)
            if time.monotonic() - began > self.limit_s:
                text = f"gave up on {names} after {self.limit_s:g} s"
                return Cause(text, ExitCode.LOST_PEER)
            if lost != told:
                self.say(f"waiting up to {self.limit_s:g} s for {names}")
                told = lost
            if self.sleep(_AGAIN_S):
                return Cause("asked to stop while waiting for hosts", ExitCode.PREEMPTED)

    def say(self, text: str) -> None:
        """A line on the console."""
        print(text, file=self.console, flush=True)

    def sleep(self, seconds: float) -> bool:
        """Whether the job was asked to stop meanwhile."""
        end = time.monotonic() + seconds
        while not self.preemption.requested and time.monotonic() < end:
            time.sleep(_POLL_S)
        return self.preemption.requested

    def _report(self, found: Preflight, seconds: float) -> None:
        for finding in found.findings:
            self.say(str(finding))
        faults = len(found.faults)
        result = "all fit" if not faults else f"{faults} fault{'s' if faults > 1 else ''}"
        ranks = ", ".join(f"{host.name} ({host.slots})" for host in found.hosts)
        self.say(f"preflight of {ranks or 'no host'} in {seconds:.1f} s: {result}")
