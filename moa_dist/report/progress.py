"""How far a run is: steps, tokens and time, what is left of them, and whether it still reports."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from moa_dist.report.read import Run
from moa_dist.report.series import Series
from moa_dist.units import duration, short

_WINDOW = 100
"""Reports from which the remaining time is estimated: the last ones."""
_SILENT_S, _SILENT_REPORTS = 600.0, 10
"""A run is silent if its last report is older than this, and than so many reports take."""
_END_S = 5.0
"""Seconds by which the clocks of a supervisor and of the last report may differ."""


@dataclass(frozen=True)
class Progress:
    """How far a run is; None where it did not record enough to tell."""

    step: int
    """Last step that metrics or checkpoints know of."""
    total: int | None
    """Steps of the whole run."""
    tokens: float | None
    """Tokens read so far."""
    total_tokens: float | None
    """Tokens of the whole run."""
    is_bound: bool
    """Whether tokens are the most that can have been read: buckets of pairs are rarely full."""
    seconds: float | None
    """Time spent on these steps, including validation and checkpoints, but not between attempts."""
    seconds_per_step: float | None
    """Mean over the last reports, likewise."""
    updated: float | None
    """When the last report was written, in seconds since 1970."""

    @property
    def is_done(self) -> bool:
        """Whether all steps were taken."""
        return self.total is not None and self.step >= self.total

    @property
    def remaining(self) -> float | None:
        """Estimated seconds until the end, 0 if it is reached."""
        if self.is_done:
            return 0.0
        if self.total is None or self.seconds_per_step is None:
            return None
        return (self.total - self.step) * self.seconds_per_step


def progress(run: Run) -> Progress:
    """Return how far a run is."""
    step, total = last_step(run), run.setting("train.steps")
    total = total if isinstance(total, int) and total > 0 else None
    tokens, elapsed = tokens_by_step(run), finite(run, "elapsed")
    batch, length = run.setting("train.global_batch"), _tokens_per_sample(run)
    total_tokens = None
    if len(tokens) and total and isinstance(batch, int) and length:
        # Steps so far may have had other sizes.
        left = max(total - int(tokens.steps[-1]), 0)
        total_tokens = float(tokens.values[-1]) + left * batch * length
    return Progress(
        step,
        total,
        float(tokens.values[-1]) if len(tokens) else None,
        total_tokens,
        _translates(run),
        float(elapsed.values[-1]) if len(elapsed) else None,
        _seconds_per_step(elapsed),
        run.updated,
    )


def last_step(run: Run) -> int:
    """Return the last step that metrics or checkpoints know of."""
    steps = [int(series.steps[-1]) for series in run.series.values() if len(series)]
    return max([0, *run.starts, *steps, *(index.step for index in run.checkpoints)])


def tokens_by_step(run: Run) -> Series:
    """Return the tokens read so far at each reported step; empty if unknown.

    Runs of earlier versions did not record them: then all sequences count as full.
    """
    if "tokens_read" in run.series and len(recorded := finite(run, "tokens_read")):
        return recorded
    samples, length = finite(run, "samples"), _tokens_per_sample(run)
    return Series.of(samples.steps, samples.values * length) if length else Series.of([], [])


def state(run: Run, now: float) -> tuple[str, bool]:
    """Describe whether the run is done, runs, or stopped, and whether that needs attention.

    `now` is the current time in seconds since 1970.
    """
    so_far = progress(run)
    if so_far.is_done:
        return "done", False
    if so_far.updated is None:
        return "not done", False
    if end := _last_end(run):
        when, cause, restarts = end
        if when > so_far.updated - _END_S and not restarts:
            return f"stopped: {cause}", True
    age = max(now - so_far.updated, 0.0)
    if age > max(_SILENT_S, _SILENT_REPORTS * _seconds_per_report(run)):
        return f"silent for {duration(age)}: stopped, or hangs", True
    return f"running, last report {duration(age)} ago", False


def clock_texts(run: Run, steps: list[int]) -> dict[str, list[str]]:
    """Return the tokens read and the time spent at each of these steps, as far as recorded."""
    columns = {}
    for name, series, text in (
        ("tokens", tokens_by_step(run), short),
        ("time", finite(run, "elapsed"), duration),
    ):
        if len(series):
            values = np.interp(steps, series.steps, series.values)
            columns[name] = [text(value) for value in values.tolist()]
    return columns


def over(values: Series, positions: Series) -> Series:
    """Return values by another count than steps: by what `positions` has at the same steps."""
    if not len(positions):
        return Series.of([], [])
    within = np.flatnonzero(values.steps <= positions.steps[-1])
    chosen = values.at(within)
    return Series.of(np.interp(chosen.steps, positions.steps, positions.values), chosen.values)


def date(seconds: float) -> str:
    """Format a time since 1970, such as `2026-11-30 12:05 UTC`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def finite(run: Run, name: str) -> Series:
    """Return the finite values of a series, none if the run does not have it."""
    series = run.series.get(name)
    return Series.of([], []) if series is None else series.finite()


def _translates(run: Run) -> bool:
    return bool(run.setting("model.objective") == "translation")


def _tokens_per_sample(run: Run) -> int:
    length = run.setting("data.bucket_tokens" if _translates(run) else "data.sequence_length")
    return length if isinstance(length, int) else 0


def _seconds_per_step(elapsed: Series) -> float | None:
    """Return the mean of the last reports; None without two of them."""
    last = elapsed.at(range(max(len(elapsed) - _WINDOW, 0), len(elapsed)))
    if len(last) < 2 or last.steps[-1] <= last.steps[0]:
        return None
    return float((last.values[-1] - last.values[0]) / (last.steps[-1] - last.steps[0]))


def _seconds_per_report(run: Run) -> float:
    elapsed = finite(run, "elapsed")
    return float(np.diff(elapsed.values).max()) if len(elapsed) > 1 else 0.0


def _last_end(run: Run) -> tuple[float, str, bool] | None:
    """Return when the last attempt ended, why, and whether another one follows, if recorded."""
    if not run.attempts:
        return None
    attempt = run.attempts[-1]
    try:
        began = datetime.fromisoformat(attempt["began"]).timestamp()
        return (
            began + float(attempt["seconds"]),
            str(attempt.get("cause")),
            bool(attempt.get("restarts")),
        )
    except (KeyError, TypeError, ValueError):
        return None
