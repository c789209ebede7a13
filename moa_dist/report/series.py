"""A quantity over the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_LARGEST = 1e300
_SMOOTH = 40
"""Windows of the moving average over a whole curve."""


@dataclass(frozen=True)
class Series:
    """Values [N] at steps [N], in order; NaN where a value was not finite."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @staticmethod
    def of(steps: ArrayLike, values: ArrayLike) -> Series:
        """Build a series from array-likes; values too large for any axis become NaN."""
        numbers = np.array(values, dtype=np.float64)
        numbers[~(np.abs(numbers) < _LARGEST)] = np.nan
        return Series(np.array(steps, dtype=np.int64), numbers)

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Series:
        """Return the points whose values are finite."""
        return self.at(np.flatnonzero(np.isfinite(self.values)))

    def at(self, positions: ArrayLike) -> Series:
        """Return the points at these positions."""
        chosen = np.asarray(positions, dtype=np.int64)
        return Series(self.steps[chosen], self.values[chosen])


def smoothed(series: Series) -> Series | None:
    """Return the moving average of finite values; None if there are too few to need one.

    Values that are not finite stay so: the gap is not bridged.
    """
    finite = series.finite()
    width = len(finite) // _SMOOTH
    if width < 2:
        return None
    sums = np.cumsum(np.insert(finite.values, 0, 0.0))
    middle = np.arange(len(finite))
    # At both ends the window shrinks, but stays centered: it must not lag behind a spike.
    half = np.minimum(np.minimum(middle, middle[::-1]), width // 2)
    means = (sums[middle + half + 1] - sums[middle - half]) / (2 * half + 1)
    values = np.full(len(series), np.nan)
    values[np.isfinite(series.values)] = means
    return Series(series.steps, values)


def downsample(series: Series, limit: int) -> Series:
    """Keep at most `limit` points: both ends, and the extremes of each stretch in between.

    Of a stretch with values that are not finite, one of these is kept too, so that the gap stays
    visible.
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
