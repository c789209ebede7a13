"""What to do about a step whose loss or gradients are of no use. All ranks decide alike.

Two counters define a run: steps taken, which decide the learning rate and the seeds of random
numbers, and samples consumed, which decide the data. A rejected step is not taken, but its samples
are consumed: the next attempt at the same step, with its learning rate and seeds, sees other
samples. A rollback restores parameters, moments and steps of a checkpoint, not its samples: those
between it and the offending ones are discarded as well, since replaying them would only lead to the
same step. Every checkpoint keeps which samples were discarded, and the recent losses, against which
a spike is measured: a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, cast

from pydantic import JsonValue

from moa_dist.config.run import TrainConfig
from moa_dist.errors import BadStepError, TrainingError

_WINDOW = 100
"""Recent losses to keep."""
_ENOUGH = 10
"""Losses before which nothing is a spike."""


@dataclass(frozen=True)
class Discarded:
    """Samples that were consumed without effect."""

    first: int
    """The first global sample."""
    last: int
    """The last global sample."""
    step: int
    """The step that was rejected."""
    reason: str
    """What was wrong with it."""


class BadSteps:
    """Applies `train.on_bad_step`, and remembers what has happened."""

    def __init__(self, config: TrainConfig, state: JsonValue = None) -> None:
        """`state` comes from a checkpoint; None for a new run."""
        self._config = config
        new: dict[str, Any] = {"losses": [], "given_up": [], "in_row": 0, "at": 0}
        saved = new if state is None else cast(dict[str, Any], state)
        self._losses: list[float] = saved["losses"]
        self._in_row: int = saved["in_row"]
        self._at: int = saved["at"]
        self.discarded = [Discarded(**entry) for entry in saved["given_up"]]
        """All discarded samples, in order."""

    def state(self) -> dict[str, JsonValue]:
        """What a checkpoint keeps; of format 2, where discarded samples are called `given_up`."""
        return {
            "losses": list(self._losses),
            "given_up": [asdict(entry) for entry in self.discarded],
            "in_row": self._in_row,
            "at": self._at,
        }

    @property
    def loss_limit(self) -> float:
        """The loss above which a step is a spike; infinite where there is none."""
        if self._config.spike_factor is None or len(self._losses) < _ENOUGH:
            return math.inf
        return self._config.spike_factor * median(self._losses)

    def accept(self, step: int, loss: float) -> None:
        """Record a step that was taken; one beyond the last bad one ends the row."""
        self._losses = [*self._losses, loss][-_WINDOW:]
        if step >= self._at:
            self._in_row = 0

    def reject(self, error: BadStepError, step: int) -> None:
        """Record that `step` was rejected. Raises TrainingError if the run should not go on."""
        self._at = max(self._at, step)
        self._in_row += 1
        policy, limit = self._config.on_bad_step, self._config.bad_step_limit
        if policy == "stop":
            raise error
        if self._in_row > limit:
            times = f"more than train.bad_step_limit = {limit} times in a row"
            raise TrainingError(f"step {step} was rejected {times}: {error}") from error

    def discard(self, first: int, stop: int, step: int, error: BadStepError) -> str:
        """Record that samples `first` to `stop` - 1 have no effect; returns a line about it.

        Those that were discarded before are not listed again.
        """
        if self.discarded:
            first = max(first, self.discarded[-1].last + 1)
        self.discarded.append(Discarded(first, stop - 1, step, str(error)))
        return f"step {step} rejected: {error}; samples {first} to {stop - 1} were discarded"

    def rollback(self, state: JsonValue) -> None:
        """Restore the losses of a checkpoint; samples discarded since then stay discarded.

        `state` is None for a checkpoint that was made, not trained.
        """
        self._losses = [] if state is None else cast(dict[str, Any], state)["losses"]
