"""Noticing ranks that stay though another one failed, before they all had met.

Once ranks have joined, their heartbeat ends them within half a minute; until then those on other
hosts would wait ten minutes for the one that will not come.
"""

from __future__ import annotations

import time
from pathlib import Path

from moa_dist.errors import ExitCode
from moa_dist.launch.record import read_records

GRACE_S = 45.0
"""How long other ranks may take to notice by themselves."""
_LOOK_S = 5.0


class Overdue:
    """Watches the records of an attempt."""

    def __init__(self, folder: Path, grace_s: float = GRACE_S, look_s: float = _LOOK_S) -> None:
        self._folder, self._grace_s, self._look_s = folder, grace_s, look_s
        self._looked = self._failed_at = 0.0

    def problem(self) -> str | None:
        """Why the attempt should be ended, None if it need not be."""
        now = time.monotonic()
        if now - self._looked < self._look_s:
            return None
        self._looked = now
        statuses = {record.rank: record.status for record in read_records(self._folder)}
        fine = (None, ExitCode.DONE, ExitCode.PREEMPTED)
        failed = [rank for rank, status in statuses.items() if status not in fine]
        if not failed:
            return None
        self._failed_at = self._failed_at or now
        if now - self._failed_at < self._grace_s:
            return None
        return f"rank {failed[0]} failed, and others still waited {self._grace_s:g} s later"
