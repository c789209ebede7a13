"""What happened to a run: attempts, discarded steps, notes, reports of failures, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from pydantic import ValidationError

from moa_dist.checkpoint.format import Index
from moa_dist.data.order import read_exclusions
from moa_dist.report.html import card, fold, nothing, table
from moa_dist.report.read import Note, Run
from moa_dist.units import duration, short

_ROUTINE = ("saved ", "no GPU telemetry")
"""Beginnings of notes that need no action."""
_MOST_NOTES = 200


def events(run: Run) -> Iterator[str]:
    """Yield cards, what needs attention first."""
    loud = [note for note in run.notes if not note.message.startswith(_ROUTINE)]
    quiet = [note for note in run.notes if note.message.startswith(_ROUTINE)]
    if run.attempts:
        yield card("Attempts", _attempts(run.attempts))
    elif len(run.starts) > 1:
        steps = ", ".join(f"{step:,}" for step in run.starts[1:])
        yield card("Restarts", f"<p>Resumed after step {steps}.</p>")
    if discarded := _discarded_entries(run):
        yield card("Discarded steps", _discarded(discarded))
    yield card("Notes", _notes(loud) if loud else nothing("Nothing out of the ordinary."))
    for name, text in run.reports.items():
        yield fold(name, f"<pre>{escape(text)}</pre>", is_open=len(run.reports) == 1)
    if run.checkpoints:
        yield card("Checkpoints", _checkpoints(run))
    if quiet:
        yield fold(f"{len(quiet)} routine notes", _notes(quiet))


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for attempt in attempts:
        seconds = attempt.get("seconds")
        before, after = (
            str(attempt.get(f"checkpoint_{when}", "-")) for when in ("before", "after")
        )
        rows.append(
            [
                str(attempt.get("attempt", "-")),
                str(attempt.get("began", "-")).replace("T", " "),
                duration(seconds) if isinstance(seconds, int | float) else "-",
                f"{before} to {after}",
                str(attempt.get("exit_code", "-")),
                str(attempt.get("cause", "-")),
            ]
        )
    head = ["attempt", "began", "took", "checkpoint", "exit code", "cause"]
    return table(head, rows, "words")


def _discarded_entries(run: Run) -> list[Any]:
    """Return what the newest checkpoint says of discarded steps, which may be anything."""
    state = run.checkpoints[-1].state.get("bad_steps") if run.checkpoints else None
    entries = state.get("given_up") if isinstance(state, dict) else None
    return entries if isinstance(entries, list) else []


def _discarded(entries: Sequence[Any]) -> str:
    rows = [
        [str(e.get("step")), f"{e.get('first')} to {e.get('last')}", str(e.get("reason"))]
        for e in entries
        if isinstance(e, dict)
    ]
    return table(["step", "samples", "why"], rows, "words")


def _notes(notes: Sequence[Note]) -> str:
    """Return a table of notes, only the last ones if they are too many for a page."""
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
    return table(["step", "samples", "size", "layout", "damaged shards left out"], rows)


def _num_excluded(index: Index) -> int:
    try:
        histories = read_exclusions(index.state.get("exclusions"))
    except ValidationError:
        return 0
    return sum(len(history[-1].shards) for history in histories.values() if history)
