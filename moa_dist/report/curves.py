"""Figures of what a run, or each of several, did over its steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from moa_dist.report.charts import NARROW, NUM_COLORS, WIDE, Bar, Line, bar_chart, line_chart
from moa_dist.report.html import curve_table, empty_figure, figure, legend, table
from moa_dist.report.read import Run
from moa_dist.report.scale import readable
from moa_dist.report.series import Series

_PURPOSES = ("plan", "dispatch", "combine", "gather", "reduce")
"""Known purposes of traffic, in a fixed order so that each keeps its color."""


def shared_curves(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the figures that compare runs, with at least one curve of each run."""
    names = labels(runs)
    several = len(runs) > 1
    marks = [] if several else runs[0].starts
    about = "Mean cross-entropy per target token, nats; dots are validations"
    if any(marks):
        about += "; vertical lines are restarts"
    yield curves("Loss", about, _losses(runs, names), is_wide=True, marks=marks)
    for name, title, about in (
        ("lr", "Learning rate", "At each step"),
        ("grad_norm", "Gradient norm", "Global, before clipping"),
        ("tokens_per_second", "Tokens per second", "All ranks together"),
    ):
        lines = [
            Line(names[i] if several else title.lower(), run.series[name], i % NUM_COLORS)
            for i, run in enumerate(runs)
            if name in run.series
        ]
        yield curves(title, about, lines, marks=marks)


def _losses(runs: Sequence[Run], names: Sequence[str]) -> list[Line]:
    several, losses = len(runs) > 1, []
    for i, run in enumerate(runs):
        for name, label in (("loss", "training"), ("validation/loss", "validation")):
            if name in run.series:
                is_dotted = name != "loss"
                full_label = f"{names[i]}, {label}" if several else label
                color = i % NUM_COLORS if several else int(is_dotted)
                losses.append(Line(full_label, run.series[name], color, is_dotted))
    return losses


def own_curves(run: Run) -> Iterator[str]:
    """Yield the figures with several lines per run: auxiliary losses and traffic."""
    aux_losses = run.group("aux_losses/")
    if aux_losses:
        lines = [
            Line(name, series, i % NUM_COLORS)
            for i, (name, series) in enumerate(aux_losses.items())
        ]
        yield curves("Auxiliary losses", "Coefficients applied", lines, marks=run.starts)
    by_purpose: dict[str, list[Series]] = defaultdict(list)
    by_layer: dict[str, dict[str, float]] = defaultdict(dict)
    for name, series in run.group("traffic/").items():
        purpose, _, layer = name.partition("/")
        by_purpose[purpose].append(series)
        if len(series.finite()):
            by_layer[layer][purpose] = float(series.finite().values.mean())
    colors = _colors_of(by_purpose)
    lines = [Line(purpose, _sum(by_purpose[purpose]), color) for purpose, color in colors.items()]
    if lines:
        about = "MiB that all ranks sent in a step, by purpose"
        yield curves("Traffic", about, lines, is_wide=True, marks=run.starts)
    if by_layer:
        yield _layers(by_layer, colors)


def curves(
    title: str,
    about: str,
    lines: Sequence[Line],
    *,
    is_wide: bool = False,
    marks: Sequence[int] = (),
) -> str:
    """Return one figure of curves, or one that says that no value was reported."""
    drawn = line_chart(title, lines, size=WIDE if is_wide else NARROW, marks=marks)
    css = "wide" if is_wide else ""
    if not drawn:
        return empty_figure(title, about, "No value was reported.", css=css)
    entries = []
    for line in lines:
        finite = line.series.finite()
        missing = len(line.series) - len(finite)
        last = readable(finite.values[-1]) if len(finite) else ""
        entries.append(
            (line.label, line.color, last + (f", {missing} ✕" if missing else ""), line.is_dotted)
        )
    if any(len(line.series.finite()) < len(line.series) for line in lines):
        about += "; ✕ was not finite"
    return figure(title, about, legend(entries) + drawn, curve_table(lines), css=css)


def bars_figure(
    title: str, about: str, bars: Sequence[Bar], colors: dict[str, int], unit: str, numbers: str
) -> str:
    """Return one figure of bars as wide as the page, with a legend of their colors."""
    drawn = bar_chart(title, bars, colors, unit)
    key = legend((part, color, "", False) for part, color in colors.items())
    return figure(title, about, key + drawn, numbers, css="wide")


def labels(runs: Sequence[Run]) -> list[str]:
    """Return the names of runs, with their folders where a name is not unique."""
    names = [run.name for run in runs]
    return [
        run.name if names.count(run.name) == 1 else f"{run.name} ({run.folder})" for run in runs
    ]


def _layers(by_layer: dict[str, dict[str, float]], colors: dict[str, int]) -> str:
    title, about = "Traffic by layer", "MiB that all ranks sent in a step, on average"
    if not any(value for parts in by_layer.values() for value in parts.values()):
        return empty_figure(title, about, "Nothing was sent.", css="wide")
    bars = [
        Bar(layer or "-", {p: parts[p] for p in colors if p in parts})
        for layer, parts in sorted(by_layer.items(), key=lambda item: _natural(item[0]))
    ]
    rows = [
        [bar.label, *(readable(value) for value in (*values, sum(values)))]
        for bar in bars
        for values in [[bar.parts.get(purpose, 0.0) for purpose in colors]]
    ]
    return bars_figure(title, about, bars, colors, "MiB", table(["layer", *colors, "sum"], rows))


def _colors_of(purposes: dict[str, list[Series]]) -> dict[str, int]:
    known = [purpose for purpose in _PURPOSES if purpose in purposes]
    others = [purpose for purpose in purposes if purpose not in _PURPOSES]
    return {purpose: i % NUM_COLORS for i, purpose in enumerate([*known, *others])}


def _sum(parts: Sequence[Series]) -> Series:
    """Add series up; one without a value at a step counts as zero there."""
    steps = np.unique(np.concatenate([part.steps for part in parts]))
    total = np.zeros(len(steps))
    for part in parts:
        total[np.searchsorted(steps, part.steps)] += part.values
    return Series.of(steps, total)


def _natural(layer: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 2 before layer 10."""
    return [(int(p), "") if p.isdecimal() else (0, p) for p in layer.split(".")]
