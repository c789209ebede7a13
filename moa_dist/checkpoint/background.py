"""Runs a task in a background thread and reports whether it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread


class Background:
    """Starts `work` immediately in a daemon thread, which does not keep the process alive."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: Exception | None = None
        self._started = time.monotonic()
        self.seconds = 0.0
        """Duration of the task, once it has ended."""
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # any error is returned by `wait`
            self._error = error
        self.seconds = time.monotonic() - self._started

    def ended(self) -> bool:
        """Return whether the task has ended, successfully or not."""
        return not self._thread.is_alive()

    def failed(self) -> bool:
        """Return whether the task has ended with an error."""
        return self.ended() and self._error is not None

    def wait(self) -> Exception | None:
        """Wait until the task ends; return its error, if any."""
        self._thread.join()
        return self._error
