"""Figures of a run's routers: a row per (layer, repeat), over time or over experts.

Shapes: R rows, C columns; G router groups, E experts each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moa_dist.models.calls import RouterCall
from moa_dist.observe.metrics import RouterSize
from moa_dist.report.heatmap import (
    MOST_CELLS,
    NUM_SHADES,
    Grid,
    Shades,
    heatmap_figure,
    merge_factor,
)
from moa_dist.report.html import empty_figure, table
from moa_dist.report.read import Load, Run
from moa_dist.report.series import Series

_MOST_COLUMNS = 90
_VARIES = 1e-9
"""Relative range of values from which they are shown."""


_SHARE = Shades(0.0, 1.0, inner=(0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5), is_share=True)
_ENTROPY = Shades(0.0, 1.0, inner=(0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99), is_share=True)
_LOAD = (0.12, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0, 8.0)
_IMBALANCE = (1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)


@dataclass(frozen=True)
class _Measure:
    """One quantity, whose colors mean the same in the figures of all routers, layers and runs."""

    name: str
    title: str
    about: Callable[[RouterSize], str]
    """Says what the quantity is, and its possible maximum."""
    shades: Callable[[float], Shades]
    """The scale of colors, given the largest possible imbalance of any router of the run."""
    worst: Callable[[NDArray[np.float64]], np.float64]
    """Chooses which of several steps in one column is shown."""
    floor: float
    """The least possible value."""
    if_floor: str | None
    """What the figure says if all values are at the floor."""
    whole: Callable[[RouterSize], float] = lambda size: 1.0
    """What values are divided by to make them shares of their possible maximum."""


_MEASURES = (
    _Measure(
        "drop_share",
        "Drop share",
        lambda size: "Share of assignments dropped",
        lambda most: _SHARE,
        np.max,
        0.0,
        "Nothing dropped.",
    ),
    _Measure(
        "load_imbalance",
        "Load imbalance",
        lambda size: f"Fullest expert over mean; at most {_most_load(size):.3g}, all tokens",
        lambda most: Shades(1.0, max(most, 2 * _IMBALANCE[-1]), inner=_IMBALANCE),
        np.max,
        1.0,
        None,
    ),
    _Measure(
        "entropy",
        "Router entropy",
        lambda size: f"Share of the maximum, ln {size.experts} = {math.log(size.experts):.2f} nats",
        lambda most: _ENTROPY,
        np.min,
        0.0,
        None,
        lambda size: math.log(size.experts) or 1.0,
    ),
    _Measure(
        "dead_experts",
        "Dead experts",
        lambda size: f"Share of {num_experts(size):,} experts without a token",
        lambda most: _SHARE,
        np.max,
        0.0,
        "None, at any step.",
        lambda size: float(num_experts(size)),
    ),
)


def num_experts(size: RouterSize) -> int:
    """Return the number of experts of all router groups."""
    return size.groups * size.experts


def _most_load(size: RouterSize) -> float:
    """Return the largest possible load over the mean: if every token chooses the same experts."""
    return size.experts / size.choices


def routing_figures(run: Run) -> dict[str, list[str]]:
    """Return the figures of each router: its measures over time, and the load of each expert."""
    routers = {call.router for calls in run.routing.values() for call in calls}
    routers |= {call.router for _, load in run.loads for call in load}
    return {router: [*_measures(run, router), *_loads(run, router)] for router in sorted(routers)}


def _measures(run: Run, router: str) -> Iterator[str]:
    size = run.router_size(router)
    for measure in (*_MEASURES, *_particular(run, router)):
        calls = {
            call: series
            for call, series in run.routing.get(measure.name, {}).items()
            if call.router == router and len(series.finite())
        }
        if calls and size is None:
            yield empty_figure(measure.title, "", "The run did not record the router's size.")
        elif calls and size is not None:
            yield _over_time(measure, calls, size, measure.shades(_most_of_all(run)))


def _spread(low: float, high: float) -> Shades:
    """Return even shades, or in equal ratios if values span orders of magnitude."""
    is_wide = 0 < low < high / 100
    inner = tuple(np.geomspace(low, high, NUM_SHADES + 1)[1:-1].tolist()) if is_wide else None
    return Shades(low, high, inner=inner)


def _always(shades: Shades) -> Callable[[float], Shades]:
    return lambda most: shades


def _particular(run: Run, router: str) -> Iterator[_Measure]:
    """Yield means that only this kind of router reports, and `experts_per_token`, if they vary."""
    for name in sorted(run.routing.keys() - {measure.name for measure in _MEASURES}):
        of_router = [s.finite() for call, s in run.routing[name].items() if call.router == router]
        values = np.concatenate([np.zeros(0), *(series.values for series in of_router)])
        if values.size and np.ptp(values) > _VARIES * np.abs(values).max():
            shades = _spread(float(values.min()), float(values.max()))
            title = name.replace("_", " ").capitalize()
            yield _Measure(
                name,
                title,
                lambda size: "Mean over tokens",
                _always(shades),
                np.mean,
                -math.inf,
                None,
            )


def _loads(run: Run, router: str) -> Iterator[str]:
    for i, (step, load) in enumerate(run.loads):
        mine = {call: load[call] for call in sorted(load) if call.router == router}
        which = "last" if i else "first" if len(run.loads) > 1 else "only"
        when = f"{which} validation, step {step:,}"
        yield from _over_experts(when, mine, run.router_size(router), _most_of_all(run))


def _most_of_all(run: Run) -> float:
    """Return the largest possible imbalance of any router; 1 if none recorded its size."""
    names = {call.router for calls in run.routing.values() for call in calls}
    return max((_most_load(s) for s in map(run.router_size, names) if s), default=1.0)


def _over_time(
    measure: _Measure, calls: dict[RouterCall, Series], size: RouterSize, shades: Shades
) -> str:
    whole = measure.whole(size)
    calls = {call: Series(each.steps, each.values / whole) for call, each in calls.items()}
    low = min(float(series.finite().values.min()) for series in calls.values())
    high = max(float(series.finite().values.max()) for series in calls.values())
    about = measure.about(size)
    if measure.if_floor and high <= measure.floor:
        return empty_figure(measure.title, about, measure.if_floor)
    longest = max(calls.values(), key=len)
    num_columns = min(_MOST_COLUMNS, len(longest), max(MOST_CELLS // len(calls), 1))
    rows = row_labels(list(calls))
    stretches = np.array_split(longest.steps, num_columns)
    first = min(int(series.steps[0]) for series in calls.values())
    last = max(int(series.steps[-1]) for series in calls.values())
    grid = Grid(
        np.stack([_columns(series, measure, num_columns) for series in calls.values()]),
        rows,
        [_steps(int(steps[0]), int(steps[-1])) for steps in stretches],
        ends=(f"step {first:,}", f"step {last:,}"),
    )
    numbers = table(
        ["layer, repeat", "first", "last", "mean", "lowest", "highest"],
        [[row, *_summary(each, shades)] for row, each in zip(rows, calls.values(), strict=True)],
    )
    return heatmap_figure(
        measure.title,
        about,
        grid,
        shades,
        about=f"{measure.title}, {shades.text(low)} to {shades.text(high)}; the table has the "
        "numbers",
        numbers=numbers,
    )


def _steps(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _columns(series: Series, measure: _Measure, num_columns: int) -> NDArray[np.float64]:
    """Return [C], the worst value of each stretch of steps; NaN where none is finite."""
    columns = []
    for stretch in np.array_split(series.values, num_columns):
        finite = stretch[np.isfinite(stretch)]
        columns.append(float(measure.worst(finite)) if finite.size else np.nan)
    return np.array(columns)


def _summary(series: Series, shades: Shades) -> list[str]:
    values = series.finite().values
    chosen = (values[0], values[-1], values.mean(), values.min(), values.max())
    return [shades.text(float(value)) for value in chosen]


def _over_experts(when: str, load: Load, size: RouterSize | None, most: float) -> Iterator[str]:
    """Yield a figure for each shape that routers of one name have."""
    for shape in sorted({counts.shape for counts in load.values()}):
        calls = [call for call, counts in load.items() if counts.shape == shape]
        num_groups, group_size = shape
        flat_RC = np.stack([load[call].reshape(-1) for call in calls])
        mean_R1 = flat_RC.mean(1, keepdims=True)
        relative_RC = flat_RC / np.where(mean_R1 > 0, mean_R1, 1.0)
        rows = row_labels(calls)
        title, experts = "Load of every expert", f"{group_size} experts"
        if num_groups > 1:
            experts = f"{num_groups} heads of {experts}"
        caption = f"{when}; {experts}, relative to the mean"
        if size is not None:
            caption += f", at most {_most_load(size):.3g}"
        caption += f"; black: {(flat_RC == 0).sum():,} of {flat_RC.size:,} without a token"
        factor = merge_factor((len(calls), num_groups * group_size), num_groups)
        if factor > 1:
            caption += f"; {factor} neighbors share a cell, which shows the fullest"
        numbers = table(
            ["layer, repeat", "fullest", "its load", "emptiest", "its load", "dead"],
            [[row, *_extremes(r)] for row, r in zip(rows, relative_RC, strict=True)],
        )
        yield heatmap_figure(
            title,
            caption,
            load_grid(relative_RC, rows, num_groups, factor),
            Shades(0.0, max(most, 2 * _LOAD[-1]), has_middle=True, inner=_LOAD),
            about=f"{title}, {caption}; the table has the fullest and the emptiest",
            numbers=numbers,
            is_half=True,
        )


def load_grid(
    load_RC: NDArray[np.float64], rows: Sequence[str], num_groups: int, factor: int
) -> Grid:
    """Join `factor` neighboring experts of a group into each cell."""
    num_rows, num_columns = load_RC.shape
    group_size = num_columns // num_groups
    padding = ((0, 0), (0, 0), (0, -group_size % factor))
    # Copies of the last expert change neither the fullest nor whether one is dead.
    padded = np.pad(load_RC.reshape(num_rows, num_groups, group_size), padding, mode="edge")
    cells = padded.reshape(num_rows, -1, factor)
    names = [
        (f"head {group}, " if num_groups > 1 else "")
        + (
            f"expert {first}"
            if factor == 1
            else f"experts {first} to {min(first + factor, group_size) - 1}"
        )
        for group in range(num_groups)
        for first in range(0, group_size, factor)
    ]
    return Grid(
        cells.max(2),
        rows,
        names,
        ends=("expert 0", f"{num_columns - 1}"),
        num_groups=num_groups,
        blackened_RC=(cells == 0).any(2),
    )


def _extremes(load_C: NDArray[np.float64]) -> list[str]:
    most, least = int(load_C.argmax()), int(load_C.argmin())
    return [
        f"expert {most}",
        f"{load_C[most]:.2f} x mean",
        f"expert {least}",
        f"{load_C[least]:.2f} x mean",
        f"{(load_C == 0).sum()}",
    ]


def row_labels(calls: Sequence[RouterCall]) -> list[str]:
    """Return labels such as `L0 R1`, without R if no layer is repeated."""
    if any(call.repeat for call in calls):
        return [f"L{call.layer} R{call.repeat}" for call in calls]
    return [f"L{call.layer}" for call in calls]
