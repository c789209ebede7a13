"""Data that `hover.js` reads from a picture's attributes to show the values under the pointer."""

from __future__ import annotations

import json
from html import escape

import numpy as np
from numpy.typing import NDArray

Rounded = list[float | int | None]


def hover_attribute(name: str, data: dict[str, object]) -> str:
    """Return the attribute `data-NAME` with `data` as JSON, with a space before it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return f' data-{name}="{escape(text)}"'


def rounded(values: NDArray[np.float64], digits: int) -> Rounded:
    """Round [N] values to `digits` significant digits, to keep pages small; NaN becomes None."""
    return [_round(value, digits) for value in values.tolist()]


def _round(value: float, digits: int) -> float | int | None:
    if not np.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e9 else short
