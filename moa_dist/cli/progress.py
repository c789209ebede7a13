"""Progress of long work, on stderr."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """Prints one line per stage, rewritten on a terminal and repeated now and then elsewhere."""

    def __init__(self) -> None:
        self._what = ""
        self._started = 0.0
        self._next = 0.0
        self._finished = False

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of the stage `what` are finished."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._started, self._next, self._finished = what, now, now, False
        if self._finished or (now < self._next and done < total):
            return
        self._finished = finished = done >= total
        terminal = sys.stderr.isatty()
        self._next = now + (0.2 if terminal else 10.0)
        elapsed = now - self._started
        eta = f"ETA {elapsed * (total - done) / done:.0f} s" if done else "ETA ?"
        line = f"{what}: {100 * done / max(total, 1):5.1f} %, "
        line += f"{elapsed:.1f} s" if finished else eta
        start, end = ("\r\033[K", "\n" if finished else "") if terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)
