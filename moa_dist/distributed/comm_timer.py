"""Measures how long this rank waits for others, and in which collective.

The results feed the reported communication share, straggler detection and hang reports. Starting
and awaiting a collective are timed separately, so only the exposed time counts, after overlap: on
a CPU the time that this thread blocks, on a GPU the time between two events on the compute
stream. The measurement itself never synchronizes the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from moa_dist.distributed.traffic import TrafficKey
from moa_dist.profiling import annotate


class Progress(NamedTuple):
    """A rank's position in its sequence of collectives, which is the same on all ranks."""

    begun: int
    """Number of collectives started so far."""
    what: TrafficKey | str
    """Names the collective that was last started or is being waited for."""
    inside: bool
    """Whether the rank is waiting in it now."""
    since: float
    """When the rank entered or left it, in monotonic seconds."""


class CommTimer:
    """Accumulates the time this rank waits in collectives."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        """Create a timer; `on_gpu` if collectives run on torch's current CUDA device."""
        self._on_gpu = on_gpu
        self._seconds = 0.0
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self.progress = Progress(0, "nothing", False, time.monotonic())
        """Replaced as a whole, so that other threads can read it."""

    @contextmanager
    def begin(self, what: TrafficKey | str) -> Iterator[None]:
        """Time the start of a collective, which blocks unless the collective is asynchronous."""
        before = self.progress
        self.progress = before._replace(begun=before.begun + 1)
        with self.wait(what):
            yield

    @contextmanager
    def wait(self, what: TrafficKey | str) -> Iterator[None]:
        """Time the wait for a collective that was started earlier."""
        began = time.monotonic()
        self.progress = Progress(self.progress.begun, what, True, began)
        try:
            with annotate("exchange"), self._on_stream():
                yield
        finally:
            ended = time.monotonic()
            self.progress = Progress(self.progress.begun, what, False, ended)
            if not self._on_gpu:
                self._seconds += ended - began

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        # Work on a side stream, such as DeepSpeed's overlapped reduction, exposes no time.
        if not self._on_gpu or torch.cuda.current_stream() != torch.cuda.default_stream():
            yield
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._spans.append((before, after))

    def settle(self) -> None:
        """Collect the events that the device has passed; call it every step to bound the queue."""
        while self._spans and self._spans[0][1].query():
            before, after = self._spans.popleft()
            self._seconds += before.elapsed_time(after) / 1000

    def take(self) -> float:
        """Return the seconds waited since the last call, as far as the device has progressed."""
        self.settle()
        taken, self._seconds = self._seconds, 0.0
        return taken


def described(what: TrafficKey | str) -> str:
    """Describe a collective, such as `dispatch of stack.layers.3.ffn, forward`."""
    if isinstance(what, str):
        return what
    return f"{what.purpose} of {what.layer}, {'backward' if what.backward else 'forward'}"
