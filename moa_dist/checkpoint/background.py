"""One piece of work in a thread of its own, whose end can be asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread


class Background:
    """Runs `work` at once. A process that ends does not wait for it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: Exception | None = None
        self._started = time.monotonic()
        self.seconds = 0.0
        """How long it took, once it has ended."""
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # handed to who waits, whatever it is
            self._error = error
        self.seconds = time.monotonic() - self._started

    def ended(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self.ended() and self._error is not None

    def wait(self) -> Exception | None:
        """Wait for its end; returns its error, if any."""
        self._thread.join()
        return self._error
