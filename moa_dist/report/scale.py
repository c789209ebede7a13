"""Axes, their ticks, and numbers formatted for people."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WIDE = 100.0
"""Ratio of largest to smallest value from which a linear axis would hide the small ones."""


_UNITS = (86400.0, 3600.0, 60.0)
"""Seconds in a day, an hour and a minute."""


@dataclass(frozen=True)
class Axis:
    """Maps values between `low` and `high` to coordinates between `start` and `stop`."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def place(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the coordinates of values, in units of the picture."""
        low, high = self._scaled(np.array([self.low, self.high]))
        share = (self._scaled(values) - low) / (high - low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return about `count` round values within the axis."""
        if not self.is_log:
            return _round_values(self.low, self.high, count)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        decades = range(first, last + 1)
        every = max(1, len(decades) // count)
        factors = (1, 2, 5) if len(decades) <= count // 2 else (1,)
        values = [factor * 10.0**decade for decade in decades[::every] for factor in factors]
        return [value for value in values if self.low <= value <= self.high]

    def _scaled(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log10(values) if self.is_log else values


def fit(values: NDArray[np.float64], start: float, stop: float) -> Axis:
    """Return an axis for at least one finite value; it is logarithmic if they differ widely."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low >= _WIDE:
        return Axis(low / 1.1, high * 1.1, start, stop, is_log=True)
    # Without a margin, ticks around nearly equal values would all read the same.
    margin = max((high - low) * 0.05, abs(high) * 0.01) or 1.0
    # Quantities that are never negative keep zero as their floor.
    floor = 0.0 if 0 <= low < (high - low) / 2 else low - margin
    return Axis(floor, high + margin, start, stop)


def time_ticks(axis: Axis, count: int) -> list[float]:
    """Return about `count` round times in seconds: whole minutes, hours or days where they fit."""
    unit = next((u for u in _UNITS if axis.high - axis.low >= count * u), 1.0)
    return [unit * value for value in _round_values(axis.low / unit, axis.high / unit, count)]


def _round_values(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [i * step for i in range(first, last + 1)]


def readable(value: float) -> str:
    """Format with four significant digits, or all before the point: 3e-4, 5.331, 12,300, 1.2e9."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if 1000 <= size < 1e6:
        return f"{value:,.0f}"
    if size >= 1e6 or 0 < size < 1e-3:
        digits, exponent = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{value + 0.0:.4g}"
