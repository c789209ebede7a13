"""The page: numbers first, then curves, routing, what went wrong, and the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from moa_dist.report.analysis import analysis_sections
from moa_dist.report.curves import labels, own_curves, shared_curves
from moa_dist.report.events import events
from moa_dist.report.html import document, fold, nothing, section, table
from moa_dist.report.numbers import Number, headline, last_step, layout
from moa_dist.report.read import Run
from moa_dist.report.routing import routing_figures
from moa_dist.report.time import time_figures


def page(runs: Sequence[Run]) -> str:
    """Return HTML about one run, or several compared, that loads nothing."""
    title = " · ".join(labels(runs))
    body = [_header(runs, title)]
    curves = section(
        "Curves", [*shared_curves(runs), *(own_curves(runs[0]) if len(runs) == 1 else ())]
    )
    if len(runs) == 1:
        (run,) = runs
        body += [_tiles(run), _problems(run), curves, section("Time", [*time_figures(run)])]
        body += _about(run)
    else:
        body += [*_comparison(runs), curves]
        for run, label in zip(runs, labels(runs), strict=True):
            own = section("Auxiliary losses and traffic", [*own_curves(run)])
            time = section("Time", [*time_figures(run)])
            parts = "".join([_problems(run), own, time, *_about(run)])
            body.append(f'<section class="run"><h2>{escape(label)}</h2>{parts}</section>')
    return document(title, body)


def _header(runs: Sequence[Run], title: str) -> str:
    if len(runs) > 1:
        return f"<header><h1>{escape(title)}</h1><p>{len(runs)} runs compared</p></header>"
    (run,) = runs
    is_done = last_step(run) == run.setting("train.steps")
    state = '<span class="chip good">done</span>' if is_done else '<span class="chip">open</span>'
    about = " · ".join(filter(None, [layout(run), str(run.folder)]))
    return f"<header><h1>{escape(title)} {state}</h1><p>{escape(about)}</p></header>"


def _tiles(run: Run) -> str:
    tiles = "".join(
        f"<div class='tile'><dt>{escape(n.label)}</dt><dd><strong>{escape(n.text)}</strong>"
        f"<span>{escape(n.detail)}</span></dd></div>"
        for n in headline(run)
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _comparison(runs: Sequence[Run]) -> Iterator[str]:
    head = labels(runs)
    rows = [["layout", *(layout(run) for run in runs)]]
    for numbers in zip(*(headline(run) for run in runs), strict=True):
        rows.append([numbers[0].label, *_marked(numbers)])
    yield _wide("Side by side", table(["", *head], rows, "compare"))
    settings = [_flat(run.config) for run in runs]
    names = sorted({name for values in settings for name in values} - {"name"})
    different = [
        [name, *(values.get(name, "-") for values in settings)]
        for name in names
        if len({values.get(name) for values in settings}) > 1
    ]
    yield _wide(
        "Settings that differ",
        table(["setting", *head], different, "compare")
        if different
        else nothing("None: the configurations are the same."),
    )


def _wide(title: str, body: str) -> str:
    return section(title, [f'<div class="card wide">{body}</div>'])


def _marked(numbers: Sequence[Number]) -> Iterator[str]:
    """Yield the runs' values as text; the best gets a star if they differ."""
    known = [n.value for n in numbers if n.value is not None]
    best = (max if numbers[0].better == "high" else min)(known, default=None)
    for number in numbers:
        is_best = number.value == best is not None and len(set(known)) > 1
        detail = f" ({number.detail})" if number.detail else ""
        yield f"{number.text}{' ★' if is_best else ''}{detail}"


def _problems(run: Run) -> str:
    items = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    warning = f'<ul class="card wide warn">{items}</ul>'
    return section("Missing or damaged", [warning] if items else [])


def _about(run: Run) -> Iterator[str]:
    about = (
        "Rows are layers L and their repeats R; where steps share a column, the worst of them is "
        "shown"
    )
    for router, routing in routing_figures(run).items():
        yield section(f"Routing: {router}", routing, about, css="quarters")
    if run.analysis is not None:
        yield from analysis_sections(run.analysis)
    yield section("What happened", [*events(run)])
    text = f"<pre>{escape(run.config_text)}</pre>"
    yield section("Configuration", [fold("config.yaml", text)])


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the settings of a nested configuration as text by path."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat
