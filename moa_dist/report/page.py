"""The page: numbers first, then curves, routing, what went wrong, and the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from pydantic import ValidationError

from moa_dist.checkpoint.format import Index
from moa_dist.data.order import read_exclusions
from moa_dist.report.analysis import analysis_sections
from moa_dist.report.curves import labels, own_curves, shared_curves
from moa_dist.report.html import document, fold, section, table
from moa_dist.report.numbers import Number, headline, last_step, layout
from moa_dist.report.read import Note, Run
from moa_dist.report.routing import routing_figures
from moa_dist.report.time import time_figures
from moa_dist.units import duration, short

_ROUTINE = ("saved ", "no GPU telemetry")
"""How notes begin that nobody needs to act on."""
_MOST_NOTES = 200


def page(runs: Sequence[Run]) -> str:
    """HTML about one run, or several compared. It loads nothing and runs nothing."""
    title = " · ".join(labels(runs))
    body = [_header(runs, title)]
    body += _tiles(runs[0]) if len(runs) == 1 else _comparison(runs)
    curves = [*shared_curves(runs)]
    if len(runs) == 1:
        body.append(_problems(runs[0]))
        body.append(section("Curves", [*curves, *own_curves(runs[0])]))
        body.append(section("Time", [*time_figures(runs[0])]))
        body += _about(runs[0])
    else:
        body.append(section("Curves", curves))
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


def _tiles(run: Run) -> Iterator[str]:
    tiles = "".join(
        f"<div class='tile'><dt>{escape(n.label)}</dt><dd><strong>{escape(n.text)}</strong>"
        f"<span>{escape(n.detail)}</span></dd></div>"
        for n in headline(run)
    )
    yield f'<dl class="tiles">{tiles}</dl>'


def _comparison(runs: Sequence[Run]) -> Iterator[str]:
    columns = [headline(run) for run in runs]
    rows = [["layout", *(layout(run) for run in runs)]]
    for numbers in zip(*columns, strict=True):
        rows.append([numbers[0].label, *_marked(numbers)])
    compared = table(["", *labels(runs)], rows, "compare")
    yield section("Side by side", [f'<div class="card wide">{compared}</div>'])
    settings = [_flat(run.config) for run in runs]
    names = sorted({name for values in settings for name in values} - {"name"})
    different = [
        [name, *(values.get(name, "-") for values in settings)]
        for name in names
        if len({values.get(name) for values in settings}) > 1
    ]
    body = (
        table(["setting", *labels(runs)], different, "compare")
        if different
        else '<p class="none">None: the configurations are the same.</p>'
    )
    yield section("Settings that differ", [f'<div class="card wide">{body}</div>'])


def _marked(numbers: Sequence[Number]) -> Iterator[str]:
    """Texts, the best of those that differ with a star."""
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
        "Rows are layers L and their repeats R; of steps that share a column, the worst is shown"
    )
    for router, routing in routing_figures(run).items():
        yield section(f"Routing: {router}", routing, about, css="quarters")
    if run.analysis is not None:
        yield from analysis_sections(run.analysis)
    yield section("What happened", [*_events(run)])
    text = f"<pre>{escape(run.config_text)}</pre>"
    yield section("Configuration", [fold("config.yaml", text)])


def _events(run: Run) -> Iterator[str]:
    loud = [note for note in run.notes if not note.message.startswith(_ROUTINE)]
    quiet = [note for note in run.notes if note.message.startswith(_ROUTINE)]
    if run.attempts:
        yield _card("Attempts", _attempts(run.attempts))
    elif len(run.starts) > 1:
        steps = ", ".join(f"{step:,}" for step in run.starts[1:])
        yield _card("Restarts", f"<p>Went on after step {steps}.</p>")
    given_up = run.checkpoints[-1].state.get("bad_steps") if run.checkpoints else None
    refused = given_up.get("given_up") if isinstance(given_up, dict) else None
    if isinstance(refused, list) and refused:
        yield _card("Refused steps", _refused(refused))
    nothing = '<p class="none">Nothing out of the ordinary.</p>'
    yield _card("Notes", _notes(loud) if loud else nothing)
    for name, text in run.reports.items():
        yield fold(name, f"<pre>{escape(text)}</pre>", is_open=len(run.reports) == 1)
    if run.checkpoints:
        yield _card("Checkpoints", _checkpoints(run))
    if quiet:
        yield fold(f"{len(quiet)} routine notes", _notes(quiet))


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for attempt in attempts:
        seconds = attempt.get("seconds")
        rows.append(
            [
                str(attempt.get("attempt", "-")),
                str(attempt.get("began", "-")).replace("T", " "),
                duration(seconds) if isinstance(seconds, int | float) else "-",
                " to ".join(
                    str(attempt.get(f"checkpoint_{when}", "-")) for when in ("before", "after")
                ),
                str(attempt.get("exit_code", "-")),
                str(attempt.get("cause", "-")),
            ]
        )
    return table(["attempt", "began", "took", "checkpoint", "ended", "cause"], rows, "words")


def _refused(entries: Sequence[Any]) -> str:
    rows = [
        [str(e.get("step")), f"{e.get('first')} to {e.get('last')}", str(e.get("reason"))]
        for e in entries
        if isinstance(e, dict)
    ]
    return table(["step", "samples given up", "why"], rows, "words")


def _notes(notes: Sequence[Note]) -> str:
    """The last ones, if there are too many for a page."""
    rows = [[f"{note.step:,}", note.message] for note in notes[-_MOST_NOTES:]]
    left_out = len(notes) - len(rows)
    before = f"<p>{left_out:,} earlier ones are not shown.</p>" if left_out else ""
    return before + table(["after step", "note"], rows, "words")


def _checkpoints(run: Run) -> str:
    rows = []
    for index in run.checkpoints:
        parallel = index.config.parallel
        rows.append(
            [
                f"{index.step:,}",
                f"{index.samples:,}",
                f"{short(sum(index.files.values()))}B",
                f"W {index.world_size} ep {parallel.expert_parallel} ZeRO {parallel.zero_stage}",
                str(_num_excluded(index)),
            ]
        )
    return table(["step", "samples", "size", "saved in", "damaged shards left out"], rows)


def _num_excluded(index: Index) -> int:
    try:
        history = read_exclusions(index.state.get("exclusions"))
    except ValidationError:
        return 0
    return len(history[-1].shards) if history else 0


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Path -> value, as text."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _card(title: str, body: str) -> str:
    return f'<div class="card wide"><h3>{escape(title)}</h3>{body}</div>'
