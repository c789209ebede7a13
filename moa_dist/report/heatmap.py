"""Grids of shaded cells as SVG: one path per shade, so that thousands of cells stay small.

Shapes: R rows, C columns. Colours, by class `q0` (low) to `q8` (high) or `d0` to `d8` around a
middle, are the page's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moa_dist.report.charts import picture

NUM_SHADES = 9
_LABELS, _BOTTOM, _HEIGHT = 46, 18, 132
_SPACE_OF_LABEL = 12


@dataclass(frozen=True)
class Shades:
    """What the colours stand for."""

    low: float
    high: float
    has_middle: bool = False
    """Colours run apart from the middle, not from low to high."""

    @property
    def css(self) -> str:
        """How the names of their classes begin."""
        return "d" if self.has_middle else "q"

    def of(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """0 ... NUM_SHADES - 1, and -1 of NaN."""
        share = (values - self.low) / ((self.high - self.low) or 1.0)
        share = np.nan_to_num(np.clip(share, 0, 1))
        shades = np.minimum(share * NUM_SHADES, NUM_SHADES - 1).astype(np.int64)
        return np.where(np.isnan(values), -1, shades)


def heatmap(
    title: str,
    values_RC: NDArray[np.float64],
    rows: Sequence[str],
    columns: tuple[str, str],
    shades: Shades,
    *,
    about: str,
    width: int = 250,
    num_groups: int = 1,
    crossed_RC: NDArray[np.bool_] | None = None,
) -> str:
    """One picture.

    Args:
        title: what is shown.
        values_RC: what the shades say.
        rows: a label each; where they are too many, some are left out.
        columns: labels of the first and of the last.
        shades: what the colours stand for.
        about: what screen readers say of it.
        width: of the picture.
        num_groups: equal groups of columns, set apart.
        crossed_RC: cells to be crossed out.
    """
    num_rows, num_columns = values_RC.shape
    row_height = max(_HEIGHT // num_rows, 6) if num_rows > 4 else 24
    gap = 4 if num_groups > 1 else 0
    cell = (width - _LABELS - gap * (num_groups - 1)) / num_columns
    left_C = _LABELS + cell * np.arange(num_columns)
    left_C += gap * (np.arange(num_columns) * num_groups // num_columns)
    group_C = np.arange(num_columns) * num_groups // num_columns
    paths: dict[str, list[str]] = {}
    for r, shade_C in enumerate(shades.of(values_RC)):
        for first, stop in _stretches(shade_C, group_C):
            if shade_C[first] >= 0:
                length, place = cell * (stop - first), f"{left_C[first]:.1f} {r * row_height}"
                box = f"M{place}h{length:.1f}v{row_height}h-{length:.1f}z"
                paths.setdefault(f"{shades.css}{shade_C[first]}", []).append(box)
    inside = [f'<path class="{name}" d="{"".join(d)}"/>' for name, d in sorted(paths.items())]
    if crossed_RC is not None and crossed_RC.any():
        crosses = "".join(
            f"M{left_C[c]:.1f} {r * row_height}l{cell:.1f} {row_height}"
            for r, c in np.argwhere(crossed_RC)
        )
        inside.append(f'<path class="cross" d="{crosses}"/>')
    height = num_rows * row_height
    inside += _row_labels(rows, row_height)
    inside.append(f'<text x="{_LABELS}" y="{height + 13}">{escape(columns[0])}</text>')
    inside.append(f'<text class="end" x="{width}" y="{height + 13}">{escape(columns[1])}</text>')
    return picture(title, about, (width, height + _BOTTOM), inside)


def key(shades: Shades, low: str, high: str) -> str:
    """What the shades mean, in a line."""
    boxes = "".join(
        f'<rect class="{shades.css}{i}" x="{12 * i}" width="12" height="10"/>'
        for i in range(NUM_SHADES)
    )
    width = 12 * NUM_SHADES
    return (
        f'<p class="key">{escape(low)} <svg aria-hidden="true" width="{width}" height="10" '
        f'viewBox="0 0 {width} 10">{boxes}</svg> {escape(high)}</p>'
    )


def _stretches(shade_C: NDArray[np.int64], group_C: NDArray[np.int64]) -> Sequence[tuple[int, int]]:
    """Neighbours of one shade and one group, as (first, stop)."""
    changes = np.flatnonzero((np.diff(shade_C) != 0) | (np.diff(group_C) != 0)) + 1
    bounds = [0, *changes.tolist(), len(shade_C)]
    return list(pairwise(bounds))


def _row_labels(rows: Sequence[str], row_height: int) -> list[str]:
    labels = []
    for r in range(0, len(rows), -(-_SPACE_OF_LABEL // row_height)):
        y = max((r + 0.5) * row_height + 4, 9)  # the first row may be lower than its label
        labels.append(f'<text class="end" x="{_LABELS - 6}" y="{y:.1f}">{escape(rows[r])}</text>')
    return labels
