"""Curves and bars as SVG. The page defines colors by class, `s0` to `s7` and `f0` to `f7`.

Sizes are in units of the picture, which the page shows as about a pixel each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from moa_dist.report.hover import hover_attribute, rounded
from moa_dist.report.scale import Axis, fit, readable
from moa_dist.report.series import Series, downsample

NUM_COLORS = 8
MOST_POINTS = 500
"""Points drawn per curve, at most."""
NARROW, WIDE = (520, 230), (1080, 320)
"""Sizes of a line chart."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 26, 12, 26
_BAR, _BAR_GAP, _BAR_LABELS, _BAR_TOTALS = 16, 7, 210, 90
_MOST_MISSING = 100
_DIGITS = 5


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    series: Series
    color: int
    """0 ... NUM_COLORS - 1."""
    is_dotted: bool = False
    """Draws a dot at every point; meant for curves of few points."""


@dataclass(frozen=True)
class Bar:
    """One row of stacked values, none negative."""

    label: str
    parts: dict[str, float]
    """Values by part, in the order in which they are stacked."""


def line_chart(
    title: str, lines: Sequence[Line], *, size: tuple[int, int] = NARROW, marks: Sequence[int] = ()
) -> str:
    """Draw curves over steps, with a vertical line at each of the steps `marks`.

    Returns an empty string if no value is finite.
    """
    drawn = [(line, downsample(line.series, MOST_POINTS)) for line in lines if len(line.series)]
    values = np.concatenate([np.empty(0), *(line.series.finite().values for line in lines)])
    if not values.size:
        return ""
    width, height = size
    steps = np.concatenate([series.steps for _, series in drawn])
    first, last = int(steps.min()), int(steps.max())
    x_axis = Axis(first, max(last, first + 1), _LEFT, width - _RIGHT)
    y_axis = fit(values, height - _BOTTOM, _TOP)
    inside = _grid(x_axis, y_axis, size)
    for mark in marks:
        if first < mark < last:
            x = x_axis.place(np.array([float(mark)]))[0]
            inside.append(f'<path class="mark" d="M{x:.1f} {_TOP}V{height - _BOTTOM}"/>')
    for line, series in drawn:
        inside += _curve(line, series, x_axis, y_axis)
    scale = ", logarithmic" if y_axis.is_log else ""
    about = f"{title} over steps {first:,} to {last:,}{scale}: " + "; ".join(
        f"{line.label} ends at {readable(line.series.finite().values[-1])}"
        for line in lines
        if len(line.series.finite())
    )
    return picture(title, about, size, inside, hover=_hover(drawn, x_axis, height))


def bar_chart(title: str, bars: Sequence[Bar], colors: dict[str, int], unit: str) -> str:
    """Draw horizontal bars, one below the other, with their sums; empty if all are zero."""
    longest = max((sum(bar.parts.values()) for bar in bars), default=0.0)
    if not longest:
        return ""
    width = WIDE[0]
    room = width - _BAR_LABELS - _BAR_TOTALS
    inside = []
    for i, bar in enumerate(bars):
        y, x = i * (_BAR + _BAR_GAP), float(_BAR_LABELS)
        middle = y + _BAR * 0.75
        inside.append(
            f'<text x="{_BAR_LABELS - 8}" y="{middle}" class="end">{escape(bar.label)}</text>'
        )
        for part, value in bar.parts.items():
            length = value / longest * room
            inside.append(
                f'<rect class="f{colors[part]}" x="{x:.1f}" y="{y}" width="{length:.1f}" '
                f'height="{_BAR}"><title>{escape(part)}: {readable(value)} {unit}</title></rect>'
            )
            x += length
        total = readable(sum(bar.parts.values()))
        inside.append(f'<text x="{x + 6:.1f}" y="{middle}">{total}</text>')
    about = f"{title}, in {unit}, of {len(bars)} rows; the table below has the numbers"
    return picture(title, about, (width, len(bars) * (_BAR + _BAR_GAP)), inside)


def picture(
    title: str, about: str, size: tuple[int, int], inside: Sequence[str], *, hover: str = ""
) -> str:
    """Wrap `inside` as an SVG that screen readers can read out; `hover` is an attribute."""
    return (
        f'<svg role="img" viewBox="0 0 {size[0]} {size[1]}" aria-label="{escape(about)}"{hover}>'
        f"<title>{escape(title)}</title><desc>{escape(about)}</desc>{''.join(inside)}</svg>"
    )


def _hover(drawn: Sequence[tuple[Line, Series]], x_axis: Axis, height: int) -> str:
    lines = [
        {
            "label": line.label,
            "steps": series.steps.tolist(),
            "values": rounded(series.values, _DIGITS),
        }
        for line, series in drawn
    ]
    x = [x_axis.low, x_axis.high, x_axis.start, x_axis.stop]
    return hover_attribute("curves", {"x": x, "y": [_TOP, height - _BOTTOM], "lines": lines})


def _grid(x_axis: Axis, y_axis: Axis, size: tuple[int, int]) -> list[str]:
    width, height = size
    bottom = height - _BOTTOM
    parts = []
    for value in y_axis.ticks(5):
        y = y_axis.place(np.array([value]))[0]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{width - _RIGHT}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 7}" y="{y + 4:.1f}">{readable(value)}</text>')
    for value in x_axis.ticks(8 if width > NARROW[0] else 5):
        x = x_axis.place(np.array([value]))[0]
        if value == int(value):
            parts.append(f'<text class="mid" x="{x:.1f}" y="{height - 8}">{value:,.0f}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{width - _RIGHT}"/>')
    return parts


def _curve(line: Line, series: Series, x_axis: Axis, y_axis: Axis) -> list[str]:
    x = x_axis.place(series.steps.astype(np.float64))
    finite = np.isfinite(series.values)
    # A logarithmic axis exists only where all values are positive: NaN is replaced, not drawn.
    y = y_axis.place(np.where(finite, series.values, y_axis.high))
    name = f"<title>{escape(_summary(line))}</title>"
    parts = [f'<path class="line s{line.color}" d="{_path(x, y, finite)}">{name}</path>']
    if line.is_dotted:
        parts += [
            f'<circle class="f{line.color}" cx="{x[i]:.1f}" cy="{y[i]:.1f}" r="3">'
            f"<title>{escape(line.label)}: {readable(series.values[i])} at step "
            f"{series.steps[i]:,}</title></circle>"
            for i in np.flatnonzero(finite)
        ]
    missing = np.flatnonzero(~finite)[:_MOST_MISSING]
    if missing.size:
        crosses = "".join(f"M{x[i] - 3:.1f} {_TOP - 3}l6 6m0-6l-6 6" for i in missing)
        parts.append(f'<path class="bad" d="{crosses}"><title>not finite</title></path>')
    return parts


def _summary(line: Line) -> str:
    values = line.series.finite().values
    if not values.size:
        return f"{line.label}: not finite"
    low, high = readable(values.min()), readable(values.max())
    return f"{line.label}: {low} to {high}, ends at {readable(values[-1])}"


def _path(x: NDArray[np.float64], y: NDArray[np.float64], finite: NDArray[np.bool_]) -> str:
    """Return path data, broken where a value is not finite; `h0` shows isolated points."""
    parts, pen_is_down = [], False
    for i in range(len(x)):
        if finite[i]:
            command = "L" if pen_is_down else "M"
            parts.append(f"{command}{x[i]:.1f} {y[i]:.1f}{'' if pen_is_down else 'h0'}")
        pen_is_down = bool(finite[i])
    return "".join(parts)
