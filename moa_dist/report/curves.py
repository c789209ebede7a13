"""Figures of what a run, or each of several, did over its steps."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from moa_dist.report.charts import NARROW, NUM_COLORS, WIDE, Bar, bar_chart
from moa_dist.report.html import curve_table, empty_figure, figure, legend, table
from moa_dist.report.lines import STEPS, TIME, TOKENS, Axes, Limit, Line, line_chart
from moa_dist.report.progress import clock_texts, finite, over, tokens_by_step
from moa_dist.report.read import Run
from moa_dist.report.scale import readable
from moa_dist.report.series import Series

_LOSS = "nats per token"
_LONG = 24
"""Characters from which names of runs are shortened."""
_BEGINNING = 0.1
"""Share of a curve that may lie above its picture: else the first steps would flatten the rest."""
_PURPOSES = ("plan", "dispatch", "combine", "gather", "reduce")
"""Known purposes of traffic, in a fixed order so that each keeps its color."""


_QUANTITIES = (
    ("lr", "Learning rate", "At each step", "learning rate"),
    ("grad_norm", "Gradient norm", "Global, before clipping", "L2 norm"),
    ("tokens_per_second", "Tokens per second", "All ranks together", "tokens per second"),
)
_OF_PARTS = (
    ("grad_norm", "Gradient norm by part", "Before clipping", "L2 norm"),
    ("update_ratio", "Updates by part", "Relative to the weights", "ratio of L2 norms"),
)
"""Norm, and the figure of it."""


def shared_curves(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the figures that compare runs, with at least one curve of each run."""
    names = labels(runs)
    several = len(runs) > 1
    marks = [] if several else runs[0].starts
    clock = None if several else partial(clock_texts, runs[0])
    about = "Mean cross-entropy per target token; dots are validations"
    if any(marks):
        about += "; vertical lines are restarts"
    losses = _losses(runs, names)
    axes = Axes(_LOSS, marks=marks, clock=clock, beginning=_BEGINNING)
    yield curves("Loss", about, losses, axes, is_wide=True)
    if several:
        yield from _over_tokens_and_time(runs, names)
    for name, title, about, unit in _QUANTITIES:
        lines = [
            Line(
                names[i] if several else title.lower(),
                run.series[name],
                i % NUM_COLORS,
                is_noisy=name != "lr",
            )
            for i, run in enumerate(runs)
            if name in run.series
        ]
        axes = Axes(unit, marks=marks, clock=clock)
        if name == "grad_norm":
            axes = replace(axes, limits=_clip_norms(runs), beginning=_BEGINNING)
            yield curves(title, f"{about}; {_clipping(runs)}", lines, axes)
        else:
            yield curves(title, about, lines, axes)


def _clip_norms(runs: Sequence[Run]) -> list[Limit]:
    """Return the different norms that runs clip gradients to, in the color of a run that is alone.

    With one run, the line has a color of its own.
    """
    clipping: dict[float, list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        if isinstance(norm := run.setting("optimizer.clip_norm"), int | float):
            clipping[float(norm)].append(i % NUM_COLORS)
    return [
        Limit(norm, f"clipped to {norm:g}", own[0] if len(own) == 1 < len(runs) else None)
        for norm, own in sorted(clipping.items())
    ]


def _clipping(runs: Sequence[Run]) -> str:
    """Describe the lines that show where gradients are clipped."""
    norms = _clip_norms(runs)
    if not norms:
        return "clipping is off"
    about = "dashed: larger ones are clipped to it"
    values = finite(runs[0], "grad_norm").values
    if len(runs) == 1 and len(values):
        about += f", in {(values > norms[0].value).mean():.0%} of reports"
    return about


def _over_tokens_and_time(runs: Sequence[Run], names: Sequence[str]) -> Iterator[str]:
    """Yield the losses by tokens and by time, as steps may differ in both."""
    about = "Steps of different sizes compare by the tokens read"
    lines = _losses(runs, names, [tokens_by_step(run) for run in runs])
    yield curves("Loss over tokens", about, lines, Axes(_LOSS, TOKENS, beginning=_BEGINNING))
    about = "Validation and checkpoints count, the time between attempts does not"
    lines = _losses(runs, names, [finite(run, "elapsed") for run in runs])
    yield curves("Loss over time", about, lines, Axes(_LOSS, TIME, beginning=_BEGINNING))


def _losses(
    runs: Sequence[Run], names: Sequence[str], positions: Sequence[Series] | None = None
) -> list[Line]:
    """Return the losses by step, or by other `positions`, which each run has by step."""
    several, losses = len(runs) > 1, []
    for i, run in enumerate(runs):
        for name, label in (("loss", "training"), ("validation/loss", "validation")):
            if name not in run.series:
                continue
            is_dotted = name != "loss"
            full_label = f"{names[i]}, {label}" if several else label
            color = i % NUM_COLORS if several else int(is_dotted)
            series = run.series[name] if positions is None else over(run.series[name], positions[i])
            losses.append(Line(full_label, series, color, is_dotted, is_noisy=not is_dotted))
    return losses


def own_curves(run: Run) -> Iterator[str]:
    """Yield the figures with several lines per run: tasks, auxiliary losses and traffic."""
    clock = partial(clock_texts, run)
    if tasks := run.group("tasks/"):
        lines = [
            Line(name, series, i % NUM_COLORS, is_dotted=True)
            for i, (name, series) in enumerate(tasks.items())
        ]
        axes = Axes("result", marks=run.starts, clock=clock)
        yield curves("Zero-shot tasks", "With every validation", lines, axes)
    aux_losses = run.group("aux_losses/")
    if aux_losses:
        lines = [
            Line(name, series, i % NUM_COLORS)
            for i, (name, series) in enumerate(aux_losses.items())
        ]
        about = "Their coefficients are applied"
        yield curves("Auxiliary losses", about, lines, Axes("nats", marks=run.starts, clock=clock))
    yield from _token_means(run)
    yield from _parts(run)
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
        about = "What all ranks sent in a step, by purpose"
        axes = Axes("MiB per step", marks=run.starts, clock=clock)
        yield curves("Traffic", about, lines, axes, is_wide=True)
    if by_layer:
        yield _layers(by_layer, colors)


def _token_means(run: Run) -> Iterator[str]:
    """Yield a figure for each group of means over tokens, such as `halting`."""
    kinds: dict[str, list[Line]] = defaultdict(list)
    for name, series in run.group("token_means/").items():
        kind, _, label = name.rpartition("/")
        lines = kinds[kind]
        lines.append(Line(label.replace("_", " "), series, len(lines) % NUM_COLORS))
    for kind, lines in kinds.items():
        title = kind.replace("/", ": ").replace("_", " ").capitalize()
        axes = Axes("mean over tokens", marks=run.starts, clock=partial(clock_texts, run))
        yield curves(title, "Means over the tokens of a step", lines, axes)


def _parts(run: Run) -> Iterator[str]:
    """Yield how strongly each part of the model learns, if it was measured."""
    for name, title, about, unit in _OF_PARTS:
        lines = [
            Line(part.replace("_", " "), series, i % NUM_COLORS)
            for i, (part, series) in enumerate(run.group(f"parts/{name}/").items())
        ]
        if lines:
            yield curves(title, about, lines, Axes(unit, marks=run.starts, beginning=_BEGINNING))


def curves(
    title: str, about: str, lines: Sequence[Line], axes: Axes, *, is_wide: bool = False
) -> str:
    """Return one figure of curves, or one that says that no value was reported."""
    # Only a wide chart has room for further rows of labels.
    drawn = line_chart(
        title,
        lines,
        axes if is_wide else replace(axes, clock=None),
        size=WIDE if is_wide else NARROW,
    )
    css = "wide" if is_wide else ""
    if not drawn:
        return empty_figure(title, about, "No value was reported.", css=css)
    entries = []
    for line in lines:
        known = line.series.finite()
        missing = len(line.series) - len(known)
        last = readable(known.values[-1]) if len(known) else ""
        entries.append(
            (line.label, line.color, last + (f", {missing} ✕" if missing else ""), line.is_dotted)
        )
    if any(len(line.series.finite()) < len(line.series) for line in lines):
        about += "; ✕ was not finite"
    numbers = curve_table(lines, axes.clock) if axes.across is STEPS else ""
    return figure(title, about, legend(entries) + drawn, numbers, css=css)


def bars_figure(
    title: str, about: str, bars: Sequence[Bar], colors: dict[str, int], unit: str, numbers: str
) -> str:
    """Return one figure of bars as wide as the page, with a legend of their colors."""
    drawn = bar_chart(title, bars, colors, unit)
    key = legend((part, color, "", False) for part, color in colors.items())
    return figure(title, about, key + drawn, numbers, css="wide")


def full_names(runs: Sequence[Run]) -> list[str]:
    """Return the names of runs, with their folders where a name is not unique."""
    names = [run.name for run in runs]
    return [
        run.name if names.count(run.name) == 1 else f"{run.name} ({run.folder})" for run in runs
    ]


def labels(runs: Sequence[Run]) -> list[str]:
    """Return the full names of runs, or where they begin or end alike, what distinguishes them."""
    words = [re.findall(r"[^-_/ ]*[-_/ ]*", name)[:-1] for name in full_names(runs)]
    if len(runs) == 1 or max(len("".join(parts)) for parts in words) <= _LONG:
        return ["".join(parts) for parts in words]
    fewest = min(map(len, words))
    first = next((i for i in range(fewest) if len({p[i] for p in words}) > 1), fewest)
    rest = fewest - first
    last = next((i for i in range(rest) if len({p[len(p) - 1 - i] for p in words}) > 1), rest)
    short = ["".join(parts[first : len(parts) - last]).rstrip("-_/ ") for parts in words]
    if "" in short or len(set(short)) < len(short):
        return ["".join(parts) for parts in words]
    return [f"{'…' if first else ''}{name}{'…' if last else ''}" for name in short]


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
