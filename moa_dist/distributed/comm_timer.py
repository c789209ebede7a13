"""How long this rank waits for others, and for what: shares of time, stragglers, hangs.

Collectives are begun and awaited apart, so what counts is what is left of them after overlap: on
a CPU the time in which this thread stands still, on a GPU that in which the stream of computation
does, between two events on it. Nothing is synchronised for it.
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
    """How far a rank has come among its collectives; ranks that fit together begin as many."""

    begun: int
    """Collectives begun so far."""
    what: TrafficKey | str
    """What the last one of them, or that which is waited for, carries."""
    inside: bool
    """Waits for it now."""
    since: float
    """When that became so, in monotonic seconds."""


class CommTimer:
    """Sums up waiting until it is taken."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        """`on_gpu`: collectives run on torch's current CUDA device."""
        self._on_gpu = on_gpu
        self._seconds = 0.0
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self.progress = Progress(0, "nothing", False, time.monotonic())
        """Replaced as a whole, so that another thread may read it."""

    @contextmanager
    def begin(self, what: TrafficKey | str) -> Iterator[None]:
        """Around the start of a collective, which waits unless it runs beside computation."""
        before = self.progress
        self.progress = before._replace(begun=before.begun + 1)
        with self.wait(what):
            yield

    @contextmanager
    def wait(self, what: TrafficKey | str) -> Iterator[None]:
        """Around the wait for one that was begun."""
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
        # What runs on a stream of its own, as DeepSpeed's overlapped reduction, exposes nothing.
        if not self._on_gpu or torch.cuda.current_stream() != torch.cuda.default_stream():
            yield
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._spans.append((before, after))

    def settle(self) -> None:
        """Forget events that the device has passed, once a step, so that they do not pile up."""
        while self._spans and self._spans[0][1].query():
            before, after = self._spans.popleft()
            self._seconds += before.elapsed_time(after) / 1000

    def take(self) -> float:
        """Seconds of waiting since the last call, as far as the device has come."""
        self.settle()
        taken, self._seconds = self._seconds, 0.0
        return taken


def described(what: TrafficKey | str) -> str:
    """Such as `dispatch of stack.layers.3.ffn, forward`."""
    if isinstance(what, str):
        return what
    return f"{what.purpose} of {what.layer}, {'backward' if what.backward else 'forward'}"
