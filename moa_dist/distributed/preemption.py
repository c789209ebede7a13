"""Preemption: Ctrl-C, SIGTERM or SIGUSR1 to any rank stops all ranks at the same step boundary."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

PREEMPTION_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a job to save and stop: SIGINT is Ctrl-C; SIGTERM comes from Kubernetes,
`deepspeed` and `torchrun`; Slurm sends the configured one (`--signal`)."""
SAME_INTERRUPT_S = 3.0
"""Interrupts within this time count as one: a terminal sends Ctrl-C to ranks and launcher, and
`torchrun` then forwards it to the ranks."""
_STDERR = 2


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the preemption signals in this thread, so that processes started here survive them.

    Schedulers signal all processes of a job. Child processes inherit the mask until one of them
    unblocks the signals. Other threads of this process still receive signals in the meantime.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Preemption:
    """Context manager that records preemption signals instead of letting them end the process.

    A second Ctrl-C is not recorded: it ends the process. Enter the context in the main thread,
    where Python handles signals.
    """

    def __init__(
        self,
        *,
        notice: str = "",
        second_interrupt: signal.Handlers | Callable[[int, FrameType | None], Any] = signal.SIG_DFL,
    ) -> None:
        """Prepare to record signals.

        Args:
            notice: What to print to standard error when the first Ctrl-C arrives.
            second_interrupt: How to handle a second Ctrl-C; by default the process dies of it.
        """
        self.requested = False
        """Whether this rank shall stop; the training loop synchronizes it over ranks."""
        self._notice = notice
        self._second_interrupt = second_interrupt
        self._interrupted: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in PREEMPTION_SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers. After a request ignore SIGTERM and SIGUSR1 instead.

        The process is about to end then, and launchers that repeat the signal must not change its
        exit status.
        """
        for number, handler in self._before.items():
            if not self.requested:
                signal.signal(number, handler)
            elif number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
            if self._notice:
                # Not through `sys.stderr`, which may be in the middle of a write. The same Ctrl-C
                # may have ended whoever reads it, such as `tee`.
                with suppress(OSError):
                    os.write(_STDERR, f"\n{self._notice}\n".encode())
        elif now - self._interrupted > SAME_INTERRUPT_S:
            signal.signal(signal.SIGINT, self._second_interrupt)
            signal.raise_signal(signal.SIGINT)
