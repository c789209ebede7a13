"""Figures of what a run, or each of several, did over its steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from moa_dist.report.charts import NARROW, NUM_COLORS, WIDE, Bar, Line, bar_chart, line_chart
from moa_dist.report.html import curve_table, figure, legend, table
from moa_dist.report.read import Run
from moa_dist.report.scale import readable
from moa_dist.report.series import Series

_PURPOSES = ("plan", "dispatch", "combine", "gather", "reduce")
"""Each keeps its colour."""


def shared_curves(runs: Sequence[Run]) -> Iterator[str]:
    """What runs are compared by: a curve each, in one picture."""
    names = labels(runs)
    several = len(runs) > 1
    losses = []
    for i, run in enumerate(runs):
        color = i % NUM_COLORS if several else 0
        for name, label in (("loss", "training"), ("validation/loss", "validation")):
            if name in run.series:
                is_dotted = name != "loss"
                told = f"{names[i]}, {label}" if several else label
                line_color = color if several else int(is_dotted)
                losses.append(Line(told, run.series[name], line_color, is_dotted))
    marks = [] if several else runs[0].starts
    about = "Mean cross-entropy per target token, nats; dots are validations"
    if any(marks):
        about += "; vertical lines are restarts"
    yield curves("Loss", about, losses, is_wide=True, marks=marks)
    for name, title, about in (
        ("lr", "Learning rate", "Of each step"),
        ("grad_norm", "Gradient norm", "Global, before clipping"),
        ("tokens_per_second", "Tokens per second", "All ranks together"),
    ):
        lines = [
            Line(names[i] if several else title.lower(), run.series[name], i % NUM_COLORS)
            for i, run in enumerate(runs)
            if name in run.series
        ]
        yield curves(title, about, lines, marks=marks)


def own_curves(run: Run) -> Iterator[str]:
    """Those with several lines for one run: auxiliary losses, and traffic by purpose and layer."""
    aux_losses = run.group("aux_losses/")
    if aux_losses:
        lines = [
            Line(name, series, i % NUM_COLORS)
            for i, (name, series) in enumerate(aux_losses.items())
        ]
        yield curves("Auxiliary losses", "Coefficients applied", lines, marks=run.starts)
    traffic = run.group("traffic/")
    by_purpose: dict[str, list[Series]] = defaultdict(list)
    by_layer: dict[str, dict[str, float]] = defaultdict(dict)
    for name, series in traffic.items():
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
    """One figure; where there is nothing to draw, it says so."""
    drawn = line_chart(title, lines, size=WIDE if is_wide else NARROW, marks=marks)
    css = "wide" if is_wide else ""
    if not drawn:
        return figure(title, about, '<p class="none">No value was reported.</p>', "", css=css)
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


def labels(runs: Sequence[Run]) -> list[str]:
    """Names of runs, with their folders where a name is not enough."""
    names = [run.name for run in runs]
    return [
        run.name if names.count(run.name) == 1 else f"{run.name} ({run.folder})" for run in runs
    ]


def _layers(by_layer: dict[str, dict[str, float]], colors: dict[str, int]) -> str:
    title, about = "Traffic by layer", "MiB that all ranks sent in a step, on average"
    bars = [
        Bar(layer or "-", {p: parts[p] for p in colors if p in parts})
        for layer, parts in sorted(by_layer.items(), key=lambda item: _natural(item[0]))
    ]
    drawn = bar_chart(title, bars, colors, "MiB")
    if not drawn:
        return figure(title, about, '<p class="none">Nothing was sent.</p>', "", css="wide")
    numbers = table(
        ["layer", *colors, "sum"],
        [
            [bar.label, *(readable(value) for value in (*values, sum(values)))]
            for bar in bars
            for values in [[bar.parts.get(purpose, 0.0) for purpose in colors]]
        ],
    )
    key = legend((purpose, color, "", False) for purpose, color in colors.items())
    return figure(title, about, key + drawn, numbers, css="wide")


def _colors_of(purposes: dict[str, list[Series]]) -> dict[str, int]:
    known = [purpose for purpose in _PURPOSES if purpose in purposes]
    others = [purpose for purpose in purposes if purpose not in _PURPOSES]
    return {purpose: i % NUM_COLORS for i, purpose in enumerate([*known, *others])}


def _sum(parts: Sequence[Series]) -> Series:
    """Over layers; a step in which a layer sent nothing has no value of it."""
    steps = np.unique(np.concatenate([part.steps for part in parts]))
    total = np.zeros(len(steps))
    for part in parts:
        total[np.searchsorted(steps, part.steps)] += part.values
    return Series.of(steps, total)


def _natural(layer: str) -> list[tuple[int, str]]:
    """Layer 2 comes before layer 10."""
    return [(int(p), "") if p.isdecimal() else (0, p) for p in layer.split(".")]
