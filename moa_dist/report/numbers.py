"""The few numbers about a run that are worth reading first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moa_dist.peak_flops import peak_flops
from moa_dist.report.read import Run
from moa_dist.report.scale import readable
from moa_dist.report.series import Series
from moa_dist.report.time import most_often_slowest
from moa_dist.units import short

_UNKNOWN = "-"


@dataclass(frozen=True)
class Number:
    """One number with its label and what to know about it."""

    label: str
    text: str
    detail: str = ""
    value: float | None = None
    """Value by which runs are compared; None if it cannot be."""
    better: Literal["low", "high"] = "low"


def headline(run: Run) -> list[Number]:
    """Return the numbers about a run, with the same labels in the same order for every run."""
    return [
        _steps(run),
        _parameters(run),
        _curve(run, "Training loss", "loss", "nats per token"),
        _curve(run, "Validation perplexity", "validation/perplexity", ""),
        _curve(run, "Bits per byte", "validation/bits_per_byte", "of held-out text"),
        _speed(run),
        _communication(run),
        _straggler(run),
        _dead_experts(run),
        _restarts(run),
    ]


def last_step(run: Run) -> int:
    """Return the last step that metrics or checkpoints know of."""
    steps = [int(series.steps[-1]) for series in run.series.values() if len(series)]
    return max([0, *run.starts, *steps, *(index.step for index in run.checkpoints)])


def num_restarts(run: Run) -> int:
    """Count restarts by attempts, where a supervisor recorded them, or by starts in the metrics."""
    return max(len(run.attempts) - 1, len(run.starts) - 1, 0)


def layout(run: Run) -> str:
    """Describe ranks, ZeRO stage, device and precision, as far as known."""
    return ", ".join(_layout(run))


def _layout(run: Run) -> Iterator[str]:
    world_size = run.facts.get("world_size")
    ep, stage = run.setting("parallel.expert_parallel"), run.setting("parallel.zero_stage")
    if isinstance(world_size, int) and isinstance(ep, int) and ep > 0:
        yield f"W {world_size} = ep {ep} x edp {world_size // ep}"
    if stage is not None:
        yield f"ZeRO {stage}"
    for value in (run.facts.get("device"), run.facts.get("backend")):
        if value:
            yield str(value)
    if precision := run.setting("train.precision"):
        yield str(precision)


def _finite(run: Run, name: str) -> Series:
    series = run.series.get(name)
    return Series.of([], []) if series is None else series.finite()


def _steps(run: Run) -> Number:
    done, total = last_step(run), run.setting("train.steps")
    translates = run.setting("model.objective") == "translation"
    length = run.setting("data.bucket_tokens" if translates else "data.sequence_length")
    samples, tokens = _finite(run, "samples"), ""
    if isinstance(length, int) and len(samples):
        at_most = "at most " if translates else ""
        tokens = f"{at_most}{short(samples.values[-1] * length)} tokens"
    if not isinstance(total, int) or total < 1:
        return Number("Steps", f"{done:,}", tokens)
    share = f"{100 * done // total} % of {total:,}"
    return Number("Steps", f"{done:,}", ", ".join(filter(None, [share, tokens])))


def _parameters(run: Run) -> Number:
    total, active = (run.facts.get(f"num_{kind}parameters") for kind in ("", "active_"))
    if not isinstance(total, int) or not isinstance(active, int):
        return Number("Parameters", _UNKNOWN)
    return Number("Parameters", short(total), f"{short(active)} active per token")


def _curve(run: Run, label: str, name: str, unit: str) -> Number:
    finite = _finite(run, name)
    if not len(finite):
        return Number(label, _UNKNOWN, "none was reported")
    best = int(np.argmin(finite.values))
    detail = f"lowest {readable(finite.values[best])} at step {finite.steps[best]:,}"
    if run.series[name].steps[-1] != finite.steps[-1]:
        detail = f"at step {finite.steps[-1]:,}, later not finite; {detail}"
    value = float(finite.values[-1])
    return Number(label, readable(value), ", ".join(filter(None, [unit, detail])), value)


def _speed(run: Run) -> Number:
    finite = _finite(run, "tokens_per_second")
    if not len(finite):
        return Number("Tokens per second", _UNKNOWN, "none was reported")
    value = float(np.median(finite.values))
    peak = peak_flops(str(run.facts.get("device")), str(run.setting("train.precision")))
    flops, world_size = run.facts.get("flops_per_token"), run.facts.get("world_size")
    detail = "median, all ranks together"
    if peak and isinstance(flops, int | float) and isinstance(world_size, int) and world_size > 0:
        detail += f"; {value * flops / (world_size * peak):.1%} of peak FLOPs"
    return Number("Tokens per second", short(value), detail, value, "high")


def _communication(run: Run) -> Number:
    finite = _finite(run, "communication_share")
    if not len(finite) or run.facts.get("world_size") == 1:
        return Number("Communication share", _UNKNOWN, "no other ranks, or none reported")
    value = float(np.median(finite.values))
    detail = "of step time spent in collectives, median"
    return Number("Communication share", f"{value:.0%}", detail, value)


def _straggler(run: Run) -> Number:
    rank, detail = most_often_slowest(run)
    if not rank or run.facts.get("world_size") == 1:
        return Number("Slowest rank", _UNKNOWN, "no other ranks, or none reported")
    name, _, host = rank.partition(" (")
    return Number("Slowest rank", name, f"on {host.rstrip(')')}, {detail}")


def _dead_experts(run: Run) -> Number:
    dead = [series.finite() for series in run.routing.get("dead_experts", {}).values()]
    last = [int(series.values[-1]) for series in dead if len(series)]
    if not last:
        return Number("Dead experts", _UNKNOWN, "no routing was reported")
    drops = [series.finite() for series in run.routing.get("drop_share", {}).values()]
    worst = max((float(series.values[-1]) for series in drops if len(series)), default=0.0)
    detail = f"at the end, over {len(last)} router applications; largest drop share {worst:.1%}"
    return Number("Dead experts", f"{sum(last):,}", detail, float(sum(last)))


def _restarts(run: Run) -> Number:
    count = num_restarts(run)
    causes = [str(attempt.get("cause")) for attempt in run.attempts if attempt.get("restarts")]
    detail = f"last: {causes[-1]}" if causes else "" if count else "uninterrupted"
    return Number("Restarts", str(count), detail, float(count))
