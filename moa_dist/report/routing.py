"""Figures of a run's routers: every (layer, repeat) a row, over time or over experts.

Shapes: R rows, C columns; G router groups, E experts each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moa_dist.models.stack import RouterCall
from moa_dist.report.heatmap import Shades, heatmap, key
from moa_dist.report.html import figure, table
from moa_dist.report.read import Load, Run
from moa_dist.report.scale import readable
from moa_dist.report.series import Series

_MOST_COLUMNS = 90


@dataclass(frozen=True)
class _Measure:
    name: str
    title: str
    about: str
    worst: Callable[[NDArray[np.float64]], np.float64]
    """Which of several steps in one column is shown."""
    floor: float
    """The least it can be."""
    if_floor: str | None
    """What to say if it is never more."""


_MEASURES = (
    _Measure("drop_share", "Drop share", "Assignments dropped", np.max, 0.0, "Nothing dropped."),
    _Measure("load_imbalance", "Load imbalance", "Fullest expert over mean", np.max, 1.0, None),
    _Measure("entropy", "Router entropy", "Nats per token", np.min, 0.0, None),
    _Measure("dead_experts", "Dead experts", "Without a token", np.max, 0.0, "None, at any step."),
)


def routing_figures(run: Run) -> dict[str, list[str]]:
    """Of each router: four measures over time, then the load of every expert."""
    routers = {call.router for calls in run.routing.values() for call in calls}
    routers |= {call.router for _, load in run.loads for call in load}
    return {router: [*_measures(run, router), *_loads(run, router)] for router in sorted(routers)}


def _measures(run: Run, router: str) -> Iterator[str]:
    for measure in _MEASURES:
        calls = {
            call: series
            for call, series in run.routing.get(measure.name, {}).items()
            if call.router == router and len(series.finite())
        }
        if calls:
            yield _over_time(measure, calls)


def _loads(run: Run, router: str) -> Iterator[str]:
    for i, (step, load) in enumerate(run.loads):
        mine = {call: load[call] for call in sorted(load) if call.router == router}
        which = "last" if i else "first" if len(run.loads) > 1 else "only"
        yield from _over_experts(f"{which} validation, step {step:,}", mine)


def _over_time(measure: _Measure, calls: dict[RouterCall, Series]) -> str:
    title = measure.title
    low = min(float(series.finite().values.min()) for series in calls.values())
    high = max(float(series.finite().values.max()) for series in calls.values())
    if measure.if_floor and high <= measure.floor:
        return figure(title, measure.about, f'<p class="none">{measure.if_floor}</p>', "")
    num_columns = min(_MOST_COLUMNS, max(len(series) for series in calls.values()))
    values_RC = np.stack([_columns(series, measure, num_columns) for series in calls.values()])
    # From the least possible, so that what is harmless looks harmless; entropies lie close.
    shades = Shades(low if measure.name == "entropy" else measure.floor, high)
    first = min(int(series.steps[0]) for series in calls.values())
    last = max(int(series.steps[-1]) for series in calls.values())
    rows = row_labels(list(calls))
    drawn = heatmap(
        title,
        values_RC,
        rows,
        (f"step {first:,}", f"{last:,}"),
        shades,
        about=f"{title}, {readable(low)} to {readable(high)}; the table has the numbers",
    )
    numbers = table(
        ["layer, repeat", "first", "last", "mean", "lowest", "highest"],
        [[row, *_summary(series)] for row, series in zip(rows, calls.values(), strict=True)],
    )
    body = drawn + key(shades, readable(shades.low), readable(shades.high))
    return figure(title, measure.about, body, numbers)


def _columns(series: Series, measure: _Measure, num_columns: int) -> NDArray[np.float64]:
    """[C] the worst value of each stretch of steps; NaN where none is finite."""
    columns = []
    for stretch in np.array_split(series.values, num_columns):
        finite = stretch[np.isfinite(stretch)]
        columns.append(float(measure.worst(finite)) if finite.size else np.nan)
    return np.array(columns)


def _summary(series: Series) -> list[str]:
    values = series.finite().values
    return [readable(v) for v in (values[0], values[-1], values.mean(), values.min(), values.max())]


def _over_experts(when: str, load: Load) -> Iterator[str]:
    """One figure, or several if routers of this name differ in shape."""
    for shape in sorted({counts.shape for counts in load.values()}):
        calls = [call for call, counts in load.items() if counts.shape == shape]
        num_groups, num_experts = shape
        flat_RC = np.stack([load[call].reshape(-1) for call in calls])
        mean_R1 = flat_RC.mean(1, keepdims=True)
        relative_RC = flat_RC / np.where(mean_R1 > 0, mean_R1, 1.0)
        rows = row_labels(calls)
        title = "Load of every expert"
        experts = f"{num_experts} experts"
        if num_groups > 1:
            experts = f"{num_groups} heads of {experts}"
        about = f"{when}; {experts}, in relation to the mean; crossed out: without a token"
        shades = Shades(0.0, 2.0, has_middle=True)
        drawn = heatmap(
            title,
            relative_RC,
            rows,
            ("expert 0", f"{num_groups * num_experts - 1}"),
            shades,
            about=f"{title}, {about}; the table has the fullest and the emptiest",
            width=520,
            num_groups=num_groups,
            crossed_RC=flat_RC == 0,
        )
        numbers = table(
            ["layer, repeat", "fullest", "its load", "emptiest", "its load", "dead"],
            [[row, *_extremes(r)] for row, r in zip(rows, relative_RC, strict=True)],
        )
        yield figure(
            title, about, drawn + key(shades, "0", "2 x mean or more"), numbers, css="half"
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
    """Such as `L0 R1`; layers that are not repeated need no R."""
    if any(call.repeat for call in calls):
        return [f"L{call.layer} R{call.repeat}" for call in calls]
    return [f"L{call.layer}" for call in calls]
