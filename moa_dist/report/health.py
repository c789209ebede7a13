"""What about a run needs a person's attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from moa_dist.report.numbers import VALIDATION, dead_experts
from moa_dist.report.progress import finite, state
from moa_dist.report.read import Run
from moa_dist.report.scale import readable
from moa_dist.report.series import Series
from moa_dist.report.time import most_often_slowest

_RECENT = 10
"""Reports that count as recent."""
_RISEN, _RISEN_VALIDATION = 1.1, 1.01
"""Ratios of a recent to the lowest loss from which it has risen; training losses are noisy."""
_SLOW = 0.7
"""Ratio of recent to usual tokens per second below which a run has become slow."""
_DROPS = 0.05
"""Share of dropped assignments that hurts."""
_COLLAPSED = 0.5
"""Share of the possible maximum of imbalance from which a router has collapsed."""
_STRAGGLES, _MOSTLY = 1.3, 0.8
"""Ratio of work, and share of the reports, from which one rank holds up the others."""


def warnings(run: Run, now: float) -> list[str]:
    """Return what needs attention, the worst first; `now` is in seconds since 1970."""
    text, is_bad = state(run, now)
    found = [f"The run is {text}"] if is_bad else []
    return [
        *found,
        *_meaning(run),
        *_losses(run),
        *_routing(run),
        *_speed(run),
        *_interruptions(run),
    ]


def _meaning(run: Run) -> Iterator[str]:
    if reason := run.facts.get("looks_ahead"):
        yield f"Losses and perplexities do not compare with other models': {reason}"


def _losses(run: Run) -> Iterator[str]:
    for name, label in (("loss", "training loss"), ("grad_norm", "gradient norm")):
        series = run.series.get(name, Series.of([], []))
        lost = len(series) - len(series.finite())
        if lost:
            at = series.steps[~np.isfinite(series.values)][-1]
            yield (
                f"{lost:,} of {len(series):,} reports of the {label} were not finite, last at "
                f"step {at:,}"
            )
    values = finite(run, "loss").values
    if len(values) >= 3 * _RECENT:
        means = np.convolve(values, np.full(_RECENT, 1 / _RECENT), mode="valid")
        if means.min() > 0 and means[-1] > _RISEN * means.min():
            yield (
                f"The training loss has risen: {readable(means[-1])} over the last {_RECENT} "
                f"reports, {readable(means.min())} at its best"
            )
    validation = finite(run, VALIDATION)
    if len(validation):
        best = int(validation.values.argmin())
        last = float(validation.values[-1])
        if len(validation) - best > 2 and last > _RISEN_VALIDATION * validation.values[best]:
            yield (
                f"The validation loss has risen since step {validation.steps[best]:,}: "
                f"{readable(validation.values[best])} to {readable(last)}"
            )


def _routing(run: Run) -> Iterator[str]:
    for router, (dead, total) in dead_experts(run).items():
        if dead:
            of = f" of {total:,}" if total else ""
            yield f"{router}: {dead:,}{of} experts got no token in the last report"
    for measure, text in (("drop_share", _dropped), ("load_imbalance", _collapsed)):
        worst: dict[str, float] = {}
        for call, series in run.routing.get(measure, {}).items():
            known = series.finite()
            if len(known):
                worst[call.router] = max(float(known.values[-1]), worst.get(call.router, 0.0))
        for router, value in worst.items():
            if found := text(run, router, value):
                yield f"{router}: {found}"


def _dropped(run: Run, router: str, share: float) -> str:
    return f"up to {share:.1%} of assignments are dropped" if share > _DROPS else ""


def _collapsed(run: Run, router: str, imbalance: float) -> str:
    size = run.router_size(router)
    most = size.experts / size.choices if size else 0.0
    if most <= 2 or imbalance < _COLLAPSED * most:
        return ""
    return (
        f"one expert has {imbalance:.1f} x the mean load; with all tokens it would be {most:.1f} x"
    )


def _speed(run: Run) -> Iterator[str]:
    values = finite(run, "tokens_per_second").values
    if len(values) >= 3 * _RECENT:
        recent, usual = (float(np.median(part)) for part in (values[-_RECENT:], values))
        if recent < _SLOW * usual:
            yield f"Tokens per second fell to {recent / usual:.0%} of the median"
    rank, detail = most_often_slowest(run)
    if rank and run.facts.get("world_size") != 1:
        (_, count), *_ = Counter(run.slowest).most_common(1)
        slowest, fastest = (
            finite(run, f"{which}/seconds").values for which in ("slowest", "fastest")
        )
        is_slow = (
            len(slowest) == len(fastest)
            and len(slowest) > 0
            and np.median(slowest) > _STRAGGLES * np.median(fastest)
        )
        if is_slow and count > _MOSTLY * len(run.slowest):
            yield f"{rank} holds up the others: {detail}"


def _interruptions(run: Run) -> Iterator[str]:
    if causes := [str(attempt.get("cause")) for attempt in run.attempts if attempt.get("restarts")]:
        yield f"Restarted {len(causes)} x after failures, the last: {causes[-1]}"
    if run.reports:
        yield f"Reports of failures: {', '.join(run.reports)}"
