"""Draws the plots of an analysis as PNG files with matplotlib (the extra `plots`)."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moa_dist.analyze.panels import Panel, Plate, plates
from moa_dist.analyze.results import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_COLUMNS = 2
_WIDTH, _LOWEST, _HIGHEST, _ROW = 5.2, 1.5, 4.6, 0.28
"""Width, minimum and maximum height of a panel, and height per row, in inches."""
_MOST_LABELS = 24
"""Maximum number of labels along an axis; of more rows or columns, only some are labeled."""
_MOST_NUMBERS = 16
"""Maximum number of columns whose values are printed in their cells."""


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_plots(analysis: Analysis, folder: Path) -> list[Path]:
    """Write one file per plot and return their paths. Needs matplotlib."""
    paths = []
    for plate in plates(analysis):
        paths.append(folder / f"{plate.name}.png")
        _draw(plate, f"{analysis.name}, step {analysis.step:,}", paths[-1])
    return paths


def _draw(plate: Plate, of: str, path: Path) -> None:
    # Not pyplot, which keeps figures in a global list.
    from matplotlib.figure import Figure

    num_columns = min(_COLUMNS, len(plate.panels))
    num_rows = math.ceil(len(plate.panels) / num_columns)
    tallest = max(len(panel.rows) for panel in plate.panels)
    height = min(max(_LOWEST, 1 + _ROW * tallest), _HIGHEST)
    figure = Figure(figsize=(_WIDTH * num_columns, height * num_rows + 0.9), layout="constrained")
    figure.suptitle(f"{plate.title} ({of})\n{plate.about}", fontsize=9)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes, panel in zip(grid.flat, plate.panels, strict=False):
        _draw_panel(figure, axes, panel)
    for axes in list(grid.flat)[len(plate.panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=130)


def _draw_panel(figure: Figure, axes: Axes, panel: Panel) -> None:
    num_columns = panel.values_RC.shape[1]
    # Clipped, because matplotlib would leave infinite values blank.
    image = axes.imshow(
        np.clip(panel.values_RC, panel.low, panel.high),
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r" if panel.has_middle else "Blues",
        vmin=panel.low,
        vmax=panel.high,
    )
    axes.set_title(panel.title, fontsize=9)
    _label(axes.yaxis, panel.axes[0], panel.rows)
    _label(axes.xaxis, panel.axes[1], panel.columns)
    for group in range(1, panel.num_groups):
        axes.axvline(group * num_columns / panel.num_groups - 0.5, color="black", linewidth=0.8)
    if num_columns <= _MOST_NUMBERS:
        _print_values(axes, panel)
    known = panel.values_RC[~np.isnan(panel.values_RC)]
    clipped = (bool((known < panel.low).any()), bool((known > panel.high).any()))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max"}
    bar = figure.colorbar(
        image, ax=axes, fraction=0.05, pad=0.02, extend=extend.get(clipped, "both")
    )
    bar.set_label(panel.quantity, fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _label(axis: Axis, title: str, labels: list[str]) -> None:
    every = math.ceil(len(labels) / _MOST_LABELS)
    axis.set_ticks(range(0, len(labels), every), labels[::every], fontsize=7)
    axis.set_label_text(title, fontsize=7)


def _print_values(axes: Axes, panel: Panel) -> None:
    """Print every value in its cell, with decimals for 100 steps of the scale, if they fit."""
    most = 3 if panel.values_RC.shape[1] <= _MOST_NUMBERS // 2 else 2
    decimals = min(max(2 - math.floor(math.log10(panel.high - panel.low)), 0), most)
    for (row, column), value in np.ndenumerate(panel.values_RC):
        if np.isfinite(value):
            share = (value - panel.low) / (panel.high - panel.low)
            is_dark = abs(share - 0.5) > 0.35 if panel.has_middle else share > 0.6
            color = "white" if is_dark else "black"
            text = f"{value:z.{decimals}f}"
            axes.text(column, row, text, color=color, fontsize=6, ha="center", va="center")
