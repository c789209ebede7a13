"""The page: numbers first, then curves, routing, what went wrong, and the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from moa_dist.report.analysis import analysis_sections
from moa_dist.report.comparison import comparison
from moa_dist.report.curves import full_names, labels, own_curves, shared_curves
from moa_dist.report.events import events
from moa_dist.report.health import warnings
from moa_dist.report.html import breakable, document, fold, section
from moa_dist.report.numbers import headline, hosts, layout, software
from moa_dist.report.progress import Progress, date, progress, state
from moa_dist.report.read import Run
from moa_dist.report.routing import routing_figures
from moa_dist.report.sources import source_figures
from moa_dist.report.time import time_figures
from moa_dist.units import duration, short

_IN_HEAD = ("Steps", "Time")
"""Numbers that the bar at the top of a run shows."""


def page(runs: Sequence[Run], now: float) -> str:
    """Return HTML about one run, or several compared, that loads nothing.

    `now` is the current time in seconds since 1970: it tells runs that stopped from others.
    """
    title = " · ".join(full_names(runs))
    if len(runs) == 1:
        (run,) = runs
        curves = section("Curves", [*shared_curves(runs), *own_curves(run)])
        data, time = section("Data", [*source_figures(run)]), section("Time", [*time_figures(run)])
        body = [*_head(run, now), _tiles(run), _problems(run), curves, data, time, *_about(run)]
        return document(title, body)
    names = zip(labels(runs), full_names(runs), strict=True)
    lines = "".join(
        f"<p>{escape(name if label == name else f'{label}: {name}')}</p>" for label, name in names
    )
    body = [f"<header><h1>{len(runs)} runs compared</h1>{lines}</header>"]
    body += [*comparison(runs, now), section("Curves", [*shared_curves(runs)])]
    for run, label in zip(runs, labels(runs), strict=True):
        own = section("Tasks, auxiliary losses and traffic", [*own_curves(run)])
        data, time = section("Data", [*source_figures(run)]), section("Time", [*time_figures(run)])
        parts = "".join([*_head(run, now), _problems(run), own, data, time, *_about(run)])
        body.append(f'<section class="run" aria-label="{escape(label)}">{parts}</section>')
    return document(title, body)


def _head(run: Run, now: float) -> Iterator[str]:
    """Yield a run's name, how far it is, what it ran on, and what needs attention."""
    text, is_bad = state(run, now)
    so_far = progress(run)
    css = "bad" if is_bad else "good" if so_far.is_done else ""
    chip = f'<span class="chip {css}">{"⚠ " if is_bad else ""}{escape(text)}</span>'
    about = "".join(f"<p>{escape(line)}</p>" for line in _facts(run))
    bar = ""
    if so_far.total is not None:
        bar = (
            f'<progress max="{so_far.total}" value="{min(so_far.step, so_far.total)}"></progress>'
            f"<p class='far'>{escape(_far(so_far, goes_on=not is_bad))}</p>"
        )
    yield f"<header><h1>{breakable(run.name)}</h1><p>{chip}</p>{bar}{about}</header>"
    found = warnings(run, now)
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    if found:
        yield f'<ul class="card warn attention">{items}</ul>'
    elif "loss" in run.series:
        yield '<p class="card good attention">✓ Nothing needs attention</p>'


def _far(so_far: Progress, *, goes_on: bool) -> str:
    """Describe steps, tokens and time, each with what is left or what the whole is.

    When a run that does not go on would end is not said.
    """
    total = so_far.total or 1
    parts = [f"step {so_far.step:,} of {total:,} ({100 * so_far.step // total} %)"]
    if so_far.tokens is not None:
        whole = f" of {short(so_far.total_tokens)}" if so_far.total_tokens else ""
        at_most = "at most " if so_far.is_bound else ""
        parts.append(f"{at_most}{short(so_far.tokens)}{whole} tokens")
    if so_far.seconds is not None:
        parts.append(f"{duration(so_far.seconds)} spent")
    if so_far.remaining:
        parts.append(f"about {duration(so_far.remaining)} left")
        if goes_on and so_far.updated is not None:
            parts[-1] += f", until {date(so_far.updated + so_far.remaining)}"
    return " · ".join(parts)


def _facts(run: Run) -> Iterator[str]:
    """Yield lines about layout, hosts, commit and folder, as far as known."""
    yield " · ".join(filter(None, [layout(run), hosts(run)]))
    yield " · ".join(filter(None, [software(run), str(run.folder)]))


def _tiles(run: Run) -> str:
    tiles = "".join(
        f"<div class='tile{' warn' if n.warns else ''}'><dt>{escape(n.label)}"
        f"{' ⚠' if n.warns else ''}</dt><dd><strong>{escape(n.text)}</strong>"
        f"<span>{escape(n.detail)}</span></dd></div>"
        for n in headline(run)
        if n.label not in _IN_HEAD
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _problems(run: Run) -> str:
    items = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    warning = f'<ul class="card wide warn">{items}</ul>'
    return section("Missing or damaged", [warning] if items else [])


def _about(run: Run) -> Iterator[str]:
    about = (
        "Rows are layers L and their repeats R; where steps share a column, the worst of them is "
        "shown. Colors mean the same for all routers"
    )
    for i, (router, routing) in enumerate(routing_figures(run).items()):
        yield section(f"Routing: {router}", routing, "" if i else about, css="quarters")
    if run.analysis is not None:
        yield from analysis_sections(run.analysis)
    yield section("What happened", [*events(run)])
    text = f"<pre>{escape(run.config_text)}</pre>"
    yield section("Configuration", [fold("config.yaml", text)])
