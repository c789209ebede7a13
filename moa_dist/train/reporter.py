"""Reports of a run: passed to its observer on rank 0, dropped on every other rank."""

from __future__ import annotations

from collections.abc import Iterable

from moa_dist.checkpoint.note import Note
from moa_dist.observe.metrics import (
    Observer,
    RunStart,
    SampleMetrics,
    StepMetrics,
    ValidationMetrics,
)


class Reporter:
    """An observer that is silent off rank 0, so that the loop reads the same on every rank."""

    def __init__(self, observer: Observer, rank: int) -> None:
        self._listeners = (observer,) if rank == 0 else ()

    def start(self, run: RunStart) -> None:
        """Report what is about to be trained."""
        for listener in self._listeners:
            listener.start(run)

    def step(self, metrics: StepMetrics) -> None:
        """Report a step and the interval that it ends."""
        for listener in self._listeners:
            listener.step(metrics)

    def validation(self, metrics: ValidationMetrics) -> None:
        """Report a validation."""
        for listener in self._listeners:
            listener.validation(metrics)

    def samples(self, metrics: SampleMetrics) -> None:
        """Report texts that the model continued."""
        for listener in self._listeners:
            listener.samples(metrics)

    def rewind(self, step: int) -> None:
        """Report that training goes back to after `step`."""
        for listener in self._listeners:
            listener.rewind(step)

    def notes(self, notes: Iterable[Note | str]) -> None:
        """Report what a person should know, a line each."""
        for note in notes:
            for listener in self._listeners:
                listener.note(str(note))

    def close(self) -> None:
        """Close the observer."""
        for listener in self._listeners:
            listener.close()
