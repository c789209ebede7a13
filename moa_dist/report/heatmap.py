"""Grids of shaded cells as SVG: one path per shade, so that thousands of cells stay small.

Shapes: R rows, C columns. The page defines colors by class: `q0` (low) to `q8` (high), or `d0` to
`d8` diverging from a middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moa_dist.report.charts import picture
from moa_dist.report.hover import hover_attribute, rounded
from moa_dist.report.html import figure
from moa_dist.report.scale import readable

NUM_SHADES = 9
MOST_CELLS = 4096
"""Cells of one heatmap, at most, lest the page grow too large; see `merge_factor`."""
HALF, QUARTER = 520, 250
"""Widths of a heatmap that takes half of the page, or a quarter."""
_LABELS, _BOTTOM, _HEIGHT = 46, 18, 132
_LABEL_HEIGHT = 12
_GAP = 4
_KEY_BOX, _KEY_INSET = 23, 16
_DIGITS = 3


@dataclass(frozen=True)
class Shades:
    """The range of values that the colors stand for."""

    low: float
    high: float
    has_middle: bool = False
    """Colors diverge from the middle instead of growing from low to high."""
    inner: tuple[float, ...] | None = None
    """NUM_SHADES - 1 ascending values between `low` and `high` that separate the shades, each of
    which belongs to the lower one; None spaces them evenly."""
    is_share: bool = False
    """Values are shares, which read as percent."""

    @property
    def css(self) -> str:
        """The first letter of the shades' CSS classes."""
        return "d" if self.has_middle else "q"

    def of(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return shades 0 ... NUM_SHADES - 1, and -1 for NaN."""
        shades = np.searchsorted(self._inner, np.nan_to_num(values))
        return np.where(np.isnan(values), -1, shades)

    @property
    def _inner(self) -> Sequence[float]:
        if self.inner is not None:
            return self.inner
        return np.linspace(self.low, self.high, NUM_SHADES + 1)[1:-1].tolist()

    @property
    def edges(self) -> list[str]:
        """The values at the NUM_SHADES + 1 edges of all shades, as text."""
        return [self.text(value) for value in (self.low, *self._inner, self.high)]

    @property
    def labels(self) -> dict[int, str]:
        """Short texts for the edges to label, by number of the edge."""
        edges, last = self.edges, NUM_SHADES
        if self.inner is None:
            return {0: edges[0], last: edges[last]}
        short = {i: edge.removesuffix("%") for i, edge in enumerate(edges) if i < last}
        # The lowest shade may stand for one value only.
        return {
            i: text.replace("0.", ".") for i, text in short.items() if i != 1 or text != short[0]
        } | {last: edges[last]}

    def text(self, value: float) -> str:
        """Format a value."""
        return f"{100 * value:.3g}%" if self.is_share else readable(value)

    def meaning(self, shade: int) -> str:
        """Describe the values of a shade, such as `0.5 to 0.75`."""
        low, high = self.edges[shade : shade + 2]
        if shade == 0:
            return f"up to {high}"
        return f"{low} or more" if shade == NUM_SHADES - 1 else f"{low} to {high}"


@dataclass(frozen=True)
class Grid:
    """Values by row and column, with the names that readers see."""

    values_RC: NDArray[np.float64]
    """NaN is left blank."""
    rows: Sequence[str]
    """Row names; where they would overlap, only some are drawn."""
    columns: Sequence[str]
    """Column names, shown for the cell under the pointer."""
    ends: tuple[str, str]
    """Labels drawn below the first and the last column."""
    num_groups: int = 1
    """Equal groups of columns, set apart by a gap."""
    blackened_RC: NDArray[np.bool_] | None = None
    """Cells whose lower half is black."""


def heatmap_figure(
    title: str,
    caption: str,
    grid: Grid,
    shades: Shades,
    *,
    about: str,
    numbers: str,
    is_half: bool = False,
) -> str:
    """Return a heatmap as a figure with a color key and a folded table `numbers`.

    `about` is what screen readers say.
    """
    drawn = heatmap(title, grid, shades, about=about, width=HALF if is_half else QUARTER)
    css = "half" if is_half else ""
    return figure(title, caption, drawn + _key(shades), numbers, css=css)


def heatmap(title: str, grid: Grid, shades: Shades, *, about: str, width: int = QUARTER) -> str:
    """Draw one grid; `about` is what screen readers say."""
    num_rows, num_columns = grid.values_RC.shape
    row_height = max(_HEIGHT // num_rows, 6) if num_rows > 4 else 24
    gaps = _GAP * (grid.num_groups - 1)
    cell = (width - _LABELS - gaps) / num_columns
    gap = _GAP / cell if gaps else 0.0
    group_C = np.arange(num_columns) * grid.num_groups // num_columns
    left_C = np.arange(num_columns) + gap * group_C
    paths: dict[int, list[str]] = {}
    for r, shade_C in enumerate(shades.of(grid.values_RC)):
        for first, stop in _runs(shade_C, group_C):
            if shade_C[first] >= 0:
                box = f"M{_short(left_C[first])} {r}h{stop - first}v1h-{stop - first}z"
                paths.setdefault(int(shade_C[first]), []).append(box)
    cells = [
        f'<path class="{shades.css}{shade}" d="{"".join(d)}"><title>{shades.meaning(shade)}'
        "</title></path>"
        for shade, d in sorted(paths.items())
    ]
    if grid.blackened_RC is not None and grid.blackened_RC.any():
        # A cross would fill a narrow cell, whose own color must stay visible.
        places = np.argwhere(grid.blackened_RC)
        halves = "".join(f"M{_short(left_C[c])} {r}.5h1v.5h-1z" for r, c in places)
        cells.append(f'<path class="dead" d="{halves}"/>')
    size = num_columns // grid.num_groups
    hover = hover_attribute(
        "cells",
        {
            "rows": list(grid.rows),
            "columns": list(grid.columns),
            "values": [rounded(values_C, _DIGITS) for values_C in grid.values_RC],
            "size": size,
            "gap": gap,
            "percent": shades.is_share,
        },
    )
    # One cell is one unit inside, which keeps the paths short.
    scale = f"translate({_LABELS} 0) scale({cell:.6g} {row_height})"
    height = num_rows * row_height
    first_label, last_label = map(escape, grid.ends)
    inside = [f'<g transform="{scale}"{hover}>{"".join(cells)}</g>']
    inside += _row_labels(grid.rows, row_height)
    inside.append(f'<text x="{_LABELS}" y="{height + 13}">{first_label}</text>')
    inside.append(f'<text class="end" x="{width}" y="{height + 13}">{last_label}</text>')
    return picture(title, about, (width, height + _BOTTOM), inside)


def merge_factor(shape: tuple[int, int], num_groups: int) -> int:
    """Return how many neighboring columns must share a cell to keep MOST_CELLS."""
    num_rows, num_columns = shape
    most = max(MOST_CELLS // (num_rows * num_groups), 1)
    return -(-(num_columns // num_groups) // most)


def _short(x: float) -> str:
    return f"{x:.2f}".rstrip("0").rstrip(".")


def _key(shades: Shades) -> str:
    """Return a picture of all shades with the values at their edges."""
    boxes = "".join(
        f'<rect class="{shades.css}{i}" x="{_KEY_INSET + _KEY_BOX * i}" width="{_KEY_BOX}" '
        'height="9"/>'
        for i in range(NUM_SHADES)
    )
    texts = "".join(
        f'<text class="mid" x="{_KEY_INSET + _KEY_BOX * i}" y="20">{escape(text)}</text>'
        for i, text in shades.labels.items()
    )
    width = 2 * _KEY_INSET + _KEY_BOX * NUM_SHADES
    return (
        f'<svg class="key" aria-hidden="true" width="{width}" height="22" '
        f'viewBox="0 0 {width} 22">{boxes}{texts}</svg>'
    )


def _runs(shade_C: NDArray[np.int64], group_C: NDArray[np.int64]) -> Sequence[tuple[int, int]]:
    """Return runs of columns with one shade in one group, as (first, stop)."""
    changes = np.flatnonzero((np.diff(shade_C) != 0) | (np.diff(group_C) != 0)) + 1
    bounds = [0, *changes.tolist(), len(shade_C)]
    return list(pairwise(bounds))


def _row_labels(rows: Sequence[str], row_height: int) -> list[str]:
    labels = []
    for r in range(0, len(rows), -(-_LABEL_HEIGHT // row_height)):
        y = max((r + 0.5) * row_height + 4, 9)  # the first row may be lower than its label
        labels.append(f'<text class="end" x="{_LABELS - 6}" y="{y:.1f}">{escape(rows[r])}</text>')
    return labels
