"""Detects ranks that keep waiting although another rank failed before all had joined.

Once ranks have joined, their heartbeat ends them within half a minute of a failure. Before that,
ranks on other hosts would wait ten minutes for a rank that will never join.
"""

from __future__ import annotations

import time
from pathlib import Path

from moa_dist.errors import ExitCode
from moa_dist.launch.record import read_records

GRACE_S = 45.0
"""Time in which other ranks should notice a failure by themselves."""
_POLL_S = 5.0


class Overdue:
    """Watches the records of an attempt for ranks that outlive a failed one."""

    def __init__(self, folder: Path, grace_s: float = GRACE_S, poll_s: float = _POLL_S) -> None:
        self._folder, self._grace_s, self._poll_s = folder, grace_s, poll_s
        self._polled = self._failed_at = 0.0

    def problem(self) -> str | None:
        """Return why the attempt should be ended; None if it may go on."""
        now = time.monotonic()
        if now - self._polled < self._poll_s:
            return None
        self._polled = now
        statuses = {record.rank: record.status for record in read_records(self._folder)}
        not_failed = (None, ExitCode.DONE, ExitCode.PREEMPTED)
        failed = [rank for rank, status in statuses.items() if status not in not_failed]
        if not failed:
            return None
        self._failed_at = self._failed_at or now
        if now - self._failed_at < self._grace_s:
            return None
        return f"rank {failed[0]} failed, and others were still waiting {self._grace_s:g} s later"
