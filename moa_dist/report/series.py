"""A quantity over the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_LARGEST = 1e300


@dataclass(frozen=True)
class Series:
    """Values [N] at steps [N], in order; NaN where a value was not finite."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @staticmethod
    def of(steps: ArrayLike, values: ArrayLike) -> Series:
        """From anything that numpy takes for numbers; what no axis could show becomes NaN."""
        numbers = np.array(values, dtype=np.float64)
        numbers[~(np.abs(numbers) < _LARGEST)] = np.nan
        return Series(np.array(steps, dtype=np.int64), numbers)

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Series:
        """Without the values that are not."""
        return self.at(np.flatnonzero(np.isfinite(self.values)))

    def at(self, positions: ArrayLike) -> Series:
        """The part at these positions."""
        chosen = np.asarray(positions, dtype=np.int64)
        return Series(self.steps[chosen], self.values[chosen])


def downsample(series: Series, limit: int) -> Series:
    """At most `limit` of its points: the ends, and of each stretch between the extremes.

    Of a stretch with values that are not finite, one of these is kept too, so that the gap stays.
    """
    num_points = len(series)
    if num_points <= limit:
        return series
    kept = {0, num_points - 1}
    for stretch in np.array_split(np.arange(num_points), max((limit - 2) // 3, 1)):
        finite = np.isfinite(series.values[stretch])
        if finite.any():
            values = np.where(finite, series.values[stretch], np.nan)
            kept |= {int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])}
        if not finite.all():
            kept.add(int(stretch[np.argmin(finite)]))
    return series.at(sorted(kept))
