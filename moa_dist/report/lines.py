"""Line charts as SVG: axes with names, curves that stay visible where they coincide, limits.

The page defines colors by class, `s0` to `s7` and `f0` to `f7`. Sizes are in units of the picture,
which the page shows as about a pixel each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from moa_dist.report.charts import NARROW, picture
from moa_dist.report.hover import hover_attribute, rounded
from moa_dist.report.scale import Axis, fit, readable, time_ticks
from moa_dist.report.series import Series, downsample, smoothed
from moa_dist.units import duration, short

_LEFT, _RIGHT, _TOP, _ROW = 80, 34, 26, 18
_MOST_MISSING = 100
_DIGITS = 5
_NEAR = 1.5
"""Units within which two curves cannot be told apart."""
_HIDDEN = 0.3
"""Share of a curve that another one covers, from which both are dashed in turn."""
_DASH = 7
_ENOUGH = 100
"""Points of all curves together from which the beginning may lie above the picture."""
_SMOOTH_POINTS = 120
"""Points of a moving average, which needs few."""
_FAR = 10.0
"""Factor between a limit and the values from which the limit would squeeze them: it is left out."""


@dataclass(frozen=True)
class Across:
    """What the horizontal axis of a chart counts."""

    name: str
    text: Callable[[float], str]
    """Formats a position on the axis."""
    ticks: Callable[[Axis, int], list[float]] = Axis.ticks
    """Chooses about so many positions to label."""


STEPS = Across("step", lambda step: f"{step:,.0f}")
TOKENS = Across("tokens", short)
TIME = Across("time", duration, time_ticks)


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    series: Series
    color: int
    """0 ... NUM_COLORS - 1."""
    is_dotted: bool = False
    """Draws a dot at every point; meant for curves of few points."""
    is_noisy: bool = False
    """Draws the values faintly, and their moving average over them."""


@dataclass(frozen=True)
class Limit:
    """A horizontal line that curves are compared with."""

    value: float
    label: str
    color: int | None = None
    """0 ... NUM_COLORS - 1: that of the curve it belongs to; None if it belongs to all."""


@dataclass(frozen=True)
class Axes:
    """What surrounds the curves of a chart."""

    unit: str
    """What the vertical axis counts."""
    across: Across = STEPS
    marks: Sequence[int] = ()
    """Positions of vertical lines."""
    limits: Sequence[Limit] = ()
    """Left out where they lie far from all values."""
    beginning: float = 0.0
    """Share of the horizontal axis, at its beginning, whose values need not fit the picture."""
    clock: Callable[[list[int]], Mapping[str, list[str]]] | None = None
    """Returns further texts for positions, by what they count: rows of labels below the axis."""


def line_chart(
    title: str, lines: Sequence[Line], axes: Axes, *, size: tuple[int, int] = NARROW
) -> str:
    """Draw curves; returns an empty string if no value is finite."""
    most = size[0] * 3 // 5
    drawn = [(line, downsample(line.series, most)) for line in lines if len(line.series)]
    steps = np.concatenate([np.empty(0, np.int64), *(series.steps for _, series in drawn)])
    known = np.concatenate([np.empty(0), *(line.series.finite().values for line in lines)])
    if not known.size:
        return ""
    values = _values([line.series.finite() for line in lines], axes.beginning)
    limits = [limit for limit in axes.limits if _is_close(limit.value, values)]
    first, last = int(steps.min()), int(steps.max())
    x_axis = Axis(first, max(last, first + 1), _LEFT, size[0] - _RIGHT)
    ticks = _ticks(x_axis, axes, size)
    bottom = size[1] - 8 - _ROW * len(ticks)
    y_axis = fit(np.append(values, [limit.value for limit in limits]), bottom, _TOP)
    inside = [*_frame(x_axis, y_axis, axes.unit, ticks), *_marks(axes.marks, x_axis, bottom)]
    places = [_places(series, x_axis, y_axis) for _, series in drawn]
    averages = [
        None if average is None else _places(downsample(average, _SMOOTH_POINTS), x_axis, y_axis)
        for average in (smoothed(line.series) if line.is_noisy else None for line, _ in drawn)
    ]
    dashes = _dashes([bold or place for bold, place in zip(averages, places, strict=True)])
    for curve, place, average, dash in zip(drawn, places, averages, dashes, strict=True):
        inside += _curve(*curve, place, average, dash)
    inside += _limits(limits, x_axis, y_axis)
    if (top := float(known.max())) > y_axis.high:
        text = f"↑ up to {readable(top)}"
        inside.append(f'<text class="limit" x="{_LEFT + 5}" y="{_TOP + 10}">{text}</text>')
    about = _about(title, lines, axes, x_axis, is_log=y_axis.is_log)
    return picture(title, about, size, inside, hover=_hover(drawn, x_axis, bottom, axes))


def _values(known: Sequence[Series], beginning: float) -> NDArray[np.float64]:
    """Return all values, but those at the beginning only as far as later ones reach."""
    steps = np.concatenate([series.steps for series in known])
    values = np.concatenate([series.values for series in known])
    if len(values) < _ENOUGH:
        return values
    later = values[steps >= steps.min() + beginning * (steps.max() - steps.min())]
    return values[values <= later.max()]


def _marks(marks: Sequence[int], x_axis: Axis, bottom: float) -> Iterator[str]:
    """Draw vertical lines at the positions that lie within the axis."""
    for mark in marks:
        if x_axis.low < mark < x_axis.high:
            x = x_axis.place(np.array([float(mark)]))[0]
            yield f'<path class="mark" d="M{x:.1f} {_TOP}V{bottom}"/>'


def _limits(limits: Sequence[Limit], x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    for limit in limits:
        y = y_axis.place(np.array([limit.value]))[0]
        css = "limit" if limit.color is None else f"limit s{limit.color}"
        yield f'<path class="{css}" d="M{_LEFT} {y:.1f}H{x_axis.stop}"/>'
        text = escape(limit.label)
        yield f'<text class="end limit" x="{x_axis.stop}" y="{y - 4:.1f}">{text}</text>'


def _about(title: str, lines: Sequence[Line], axes: Axes, x_axis: Axis, *, is_log: bool) -> str:
    """Describe a chart for those who do not see it."""
    scale = ", logarithmic" if is_log else ""
    ends = "; ".join(
        f"{line.label} ends at {readable(line.series.finite().values[-1])}"
        for line in lines
        if len(line.series.finite())
    )
    first, last = map(axes.across.text, (x_axis.low, x_axis.high))
    return f"{title}, {axes.unit}, over {axes.across.name} {first} to {last}{scale}: {ends}"


def _is_close(limit: float, values: NDArray[np.float64]) -> bool:
    return float(values.min()) / _FAR <= limit <= float(values.max()) * _FAR


def _ticks(x_axis: Axis, axes: Axes, size: tuple[int, int]) -> list[tuple[str, dict[float, str]]]:
    """Return rows of labels below the axis: what each counts, and its texts by coordinate."""
    chosen = axes.across.ticks(x_axis, 7 if size[0] > NARROW[0] else 5)
    positions = [int(value) for value in chosen if value == int(value)]
    places = x_axis.place(np.array(positions, dtype=np.float64)).tolist()
    rows = {axes.across.name: [axes.across.text(position) for position in positions]}
    if axes.clock:
        rows |= axes.clock(positions)
    return [(name, dict(zip(places, texts, strict=True))) for name, texts in rows.items()]


def _frame(
    x_axis: Axis, y_axis: Axis, unit: str, ticks: Sequence[tuple[str, dict[float, str]]]
) -> list[str]:
    left, right, bottom = x_axis.start, x_axis.stop, y_axis.start
    parts = [f'<text class="name" x="0" y="12">{escape(unit)}</text>']
    for value in y_axis.ticks(5):
        y = y_axis.place(np.array([value]))[0]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{left - 7}" y="{y + 4:.1f}">{readable(value)}</text>')
    for row, (name, texts) in enumerate(ticks, 1):
        y = bottom + row * _ROW
        parts.append(f'<text class="name" x="0" y="{y}">{escape(name)}</text>')
        for x, text in texts.items():
            parts.append(f'<text class="mid" x="{x:.1f}" y="{y}">{escape(text)}</text>')
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    return parts


Places = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Coordinates x [N] and y [N] of a curve's points; y is NaN where there is nothing to draw: a value
that is not finite, or lies above the picture."""


def _places(series: Series, x_axis: Axis, y_axis: Axis) -> Places:
    finite = np.isfinite(series.values)
    # A logarithmic axis exists only where all values are positive: NaN is replaced first.
    y = y_axis.place(np.where(finite, series.values, y_axis.high))
    is_visible = finite & (y >= y_axis.stop)
    return x_axis.place(series.steps.astype(np.float64)), np.where(is_visible, y, np.nan)


def _dashes(places: Sequence[Places]) -> list[str]:
    """Return an attribute for each curve that dashes those which coincide, each in turn."""
    groups: list[list[int]] = []
    for i, place in enumerate(places):
        found = next((g for g in groups if _covers(place, places[g[0]])), None)
        if found is None:
            groups.append([i])
        else:
            found.append(i)
    dashes = [""] * len(places)
    for group in groups:
        for turn, i in enumerate(group[1:], 1):
            gap, start = _DASH * (len(group) - 1), _DASH * turn
            dashes[i] = f' stroke-dasharray="{_DASH} {gap}" stroke-dashoffset="-{start}"'
    return dashes


def _covers(upper: Places, lower: Places) -> bool:
    x, y = (part[np.isfinite(upper[1])] for part in upper)
    below_x, below_y = (part[np.isfinite(lower[1])] for part in lower)
    if not len(x) or not len(below_x):
        return False
    shared = (x >= below_x[0]) & (x <= below_x[-1])
    near = np.abs(np.interp(x, below_x, below_y) - y) < _NEAR
    return bool((near & shared).mean() > _HIDDEN)


def _curve(
    line: Line, series: Series, place: Places, average: Places | None, dash: str
) -> list[str]:
    x, y = place
    parts = []
    if average:
        parts.append(f'<path class="line faint s{line.color}" d="{_path(x, y)}"/>')
    name, bold = f"<title>{escape(_summary(line))}</title>", _path(*(average or place))
    parts.append(f'<path class="line s{line.color}"{dash} d="{bold}">{name}</path>')
    if line.is_dotted or len(series.finite()) == 1:
        parts += [
            f'<circle class="f{line.color}" cx="{x[i]:.1f}" cy="{y[i]:.1f}" r="3">'
            f"<title>{escape(line.label)}: {readable(series.values[i])} at step "
            f"{series.steps[i]:,}</title></circle>"
            for i in np.flatnonzero(np.isfinite(y))
        ]
    missing = np.flatnonzero(~np.isfinite(series.values))[:_MOST_MISSING]
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


def _path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Return path data, broken where y is NaN; `h0` shows isolated points."""
    parts, pen_is_down = [], False
    for i, is_finite in enumerate(np.isfinite(y)):
        if is_finite:
            command = "L" if pen_is_down else "M"
            parts.append(f"{command}{x[i]:.1f} {y[i]:.1f}{'' if pen_is_down else 'h0'}")
        pen_is_down = bool(is_finite)
    return "".join(parts)


def _hover(drawn: Sequence[tuple[Line, Series]], x_axis: Axis, bottom: float, axes: Axes) -> str:
    lines = [
        {
            "label": line.label,
            "steps": series.steps.tolist(),
            "values": rounded(series.values, _DIGITS),
        }
        for line, series in drawn
    ]
    x = [x_axis.low, x_axis.high, x_axis.start, x_axis.stop]
    data: dict[str, object] = {"x": x, "y": [_TOP, bottom], "name": axes.across.name}
    return hover_attribute("curves", data | {"lines": lines})
