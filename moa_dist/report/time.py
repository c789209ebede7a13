"""Figures of where a run's time went: waiting, slow ranks, parts of a traced step, the GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np

from moa_dist.report.charts import Bar
from moa_dist.report.curves import bars_figure, curves
from moa_dist.report.html import table
from moa_dist.report.lines import Axes, Line
from moa_dist.report.progress import clock_texts
from moa_dist.report.read import Run, Trace
from moa_dist.report.scale import readable

_GPU = (
    ("memory_used_gib", "GPU memory", "GiB in use"),
    ("power_watts", "GPU power", "watts"),
    ("temperature_celsius", "GPU temperature", "degrees Celsius"),
    ("utilization_percent", "GPU utilization", "percent"),
)
_PASSES = {"forward": 0, "backward": 1}
_OF_BACKWARD = " (backward)"
_MOST_BARS, _MOST_ROWS = 16, 100


def time_figures(run: Run) -> Iterator[str]:
    """Yield the figures that the run has values for."""
    clock = partial(clock_texts, run)
    if "communication_share" in run.series:
        about = "Share of step time that ranks spend in collectives, sending or waiting for others"
        share = Line("share", run.series["communication_share"], 0, is_noisy=True)
        axes = Axes("share of step time", marks=run.starts, clock=clock)
        yield curves("Communication share", about, [share], axes)
    work = [
        Line(f"{which} rank", run.series[f"{which}/seconds"], color, is_noisy=True)
        for color, which in enumerate(("slowest", "fastest"))
        if f"{which}/seconds" in run.series
    ]
    if work:
        about = "A rank's own work, without waiting for others"
        axes = Axes("seconds per step", marks=run.starts, clock=clock)
        yield curves("Slowest and fastest rank", about, work, axes)
    if run.slowest:
        yield _stragglers(run)
    for trace in run.traces:
        yield _parts(trace)
    for name, title, unit in _GPU:
        if f"gpu/{name}" in run.series:
            about = "Rank 0's device"
            line = Line(title.lower(), run.series[f"gpu/{name}"], 0, is_noisy=True)
            yield curves(title, about, [line], Axes(unit, marks=run.starts, clock=clock))


def most_often_slowest(run: Run) -> tuple[str, str]:
    """Return the rank that was slowest in most reports, and details; both empty without reports."""
    if not run.slowest:
        return "", ""
    (rank, count), *_ = Counter(run.slowest).most_common(1)
    detail = f"slowest in {count} of {len(run.slowest)} reports"
    slowest, fastest = (run.series[f"{which}/seconds"].values for which in ("slowest", "fastest"))
    with np.errstate(all="ignore"):
        ratio = float(np.nanmedian(slowest / fastest)) if len(slowest) == len(fastest) else np.nan
    if np.isfinite(ratio):
        detail += f"; the slowest works {ratio:.2f} x as long as the fastest (median)"
    return rank, detail


def _stragglers(run: Run) -> str:
    counts = Counter(run.slowest).most_common()
    bars = [Bar(rank, {"reports": float(count)}) for rank, count in counts[:_MOST_BARS]]
    rows = [
        [rank, f"{count:,}", f"{count / len(run.slowest):.0%}"]
        for rank, count in counts[:_MOST_ROWS]
    ]
    return bars_figure(
        "Which rank is slowest",
        "Reports in which a rank had most work; an even spread is healthy",
        bars,
        {"reports": 0},
        "reports",
        table(["rank", "reports", "share"], rows),
    )


def _parts(trace: Trace) -> str:
    whole = {part.removesuffix(_OF_BACKWARD): dict.fromkeys(_PASSES, 0.0) for part in trace.parts}
    for part, milliseconds in trace.parts.items():
        is_backward = part.endswith(_OF_BACKWARD) or part == "backward"
        whole[part.removesuffix(_OF_BACKWARD)][["forward", "backward"][is_backward]] = milliseconds
    names = {"backward": "rest of backward", "other": "rest of forward"}
    bars = [Bar(names.get(part, part), passes) for part, passes in whole.items()]
    bars.sort(key=lambda bar: -sum(bar.parts.values()))
    total = sum(trace.parts.values())
    clock = "kernel time on its GPU" if trace.on_gpu else "its main thread"
    about = (
        f"Milliseconds of {clock} per step, traced in steps {trace.first:,} to {trace.last:,}; "
        f"{readable(total)} in all. exchange includes waiting for others; the rest is embedding, "
        "norms, head, Python"
    )
    rows = [
        [bar.label, *map(readable, values), f"{sum(values) / total:.1%}"]
        for bar in bars
        for values in [bar.parts.values()]
    ]
    numbers = table(["part", "forward", "backward", "share"], rows)
    return bars_figure(f"Parts of a step on rank {trace.rank}", about, bars, _PASSES, "ms", numbers)
