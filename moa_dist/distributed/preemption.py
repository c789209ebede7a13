"""Preemption: SIGTERM or SIGUSR1 to any rank stops all ranks at the same step boundary."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that schedulers send some time before they kill a job: SIGTERM from Kubernetes and
`deepspeed`, the configured one from Slurm (`--signal`)."""


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

    Enter it in the main thread, where Python handles signals.
    """

    def __init__(self, *, by_keyboard: bool = False) -> None:
        """With `by_keyboard` the first Ctrl-C counts as well; a second one interrupts."""
        self._signals = PREEMPTION_SIGNALS + ((signal.SIGINT,) if by_keyboard else ())
        self.requested = False
        """Whether this rank received a signal; the training loop synchronizes it over ranks."""
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
