"""Being asked to stop: SIGTERM or SIGUSR1 to any rank ends all ranks at the same step boundary."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What clusters send some time before they kill a job; Kubernetes and `deepspeed` the first,
Slurm (`--signal`) whichever is configured."""


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started here do not die of the signals, which go to all processes of a job.

    Neither do those that they start, until one of them unblocks the signals. The other threads of
    this process still take a signal that comes meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Preemption:
    """While open, remembers that one of the signals came instead of dying of it.

    To be opened in the main thread, where Python handles signals.
    """

    def __init__(self, *, by_keyboard: bool = False) -> None:
        """`by_keyboard`: the first Ctrl-C counts as well, a second one interrupts."""
        self._signals = PREEMPTION_SIGNALS + ((signal.SIGINT,) if by_keyboard else ())
        self.requested = False
        """On this rank; the training loop lets all ranks agree."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
