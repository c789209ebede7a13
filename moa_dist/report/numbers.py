"""The few numbers about a run that are worth reading first."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moa_dist.peak_flops import peak_flops
from moa_dist.report.progress import finite, over, progress, tokens_by_step
from moa_dist.report.read import Run
from moa_dist.report.routing import num_experts
from moa_dist.report.scale import readable
from moa_dist.report.time import most_often_slowest
from moa_dist.units import duration, short

_UNKNOWN = "-"
_MOST_HOSTS = 4
VALIDATION, BITS_PER_BYTE = "validation/loss", "validation/bits_per_byte"


@dataclass(frozen=True)
class Number:
    """One number with its label and what to know about it."""

    label: str
    text: str
    detail: str = ""
    value: float | None = None
    """Value by which runs are compared; None if it cannot be."""
    better: Literal["low", "high"] = "low"
    basis: Hashable = None
    """Numbers compare only where this is equal, such as data and tokens read; None: never."""
    warns: bool = False
    """Whether the number needs attention."""


def headline(run: Run) -> list[Number]:
    """Return the numbers about a run, with the same labels in the same order for every run."""
    return [
        _steps(run),
        _time(run),
        _parameters(run),
        _curve(run, "Training loss", "loss", "nats per token"),
        _curve(run, "Validation perplexity", "validation/perplexity", ""),
        _curve(run, "Bits per byte", BITS_PER_BYTE, "of held-out text"),
        _speed(run),
        _communication(run),
        _straggler(run),
        _dead_experts(run),
        _restarts(run),
    ]


def num_restarts(run: Run) -> int:
    """Count restarts by attempts, where a supervisor recorded them, or by starts in the metrics."""
    return max(len(run.attempts) - 1, len(run.starts) - 1, 0)


def layout(run: Run) -> str:
    """Describe ranks, ZeRO stage, device and precision, as far as known."""
    return ", ".join(_layout(run))


def hosts(run: Run) -> str:
    """Name the hosts with their numbers of ranks, as far as recorded; only some of many."""
    found = run.facts.get("hosts")
    if not isinstance(found, dict) or not found:
        return ""
    shown = [f"{host} ({ranks} ranks)" if ranks != 1 else host for host, ranks in found.items()]
    more = f" and {len(shown) - _MOST_HOSTS:,} more" if len(shown) > _MOST_HOSTS else ""
    kind = "host" if len(shown) == 1 else f"{len(shown):,} hosts:"
    return f"{kind} {', '.join(shown[:_MOST_HOSTS])}{more}"


def software(run: Run) -> str:
    """Describe the commit and the main packages that the run was last started with."""
    facts = run.facts.get("provenance")
    if not isinstance(facts, dict):
        return ""
    commit = facts.get("commit")
    named = [f"commit {commit[:12]}{commit[40:]}" if isinstance(commit, str) else "commit unknown"]
    packages = facts.get("packages")
    for name in ("torch", "deepspeed"):
        if isinstance(packages, dict) and packages.get(name):
            named.append(f"{name} {packages[name]}")
    return ", ".join(named)


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


def _steps(run: Run) -> Number:
    so_far, tokens = progress(run), ""
    if so_far.tokens is not None:
        tokens = f"{'at most ' if so_far.is_bound else ''}{short(so_far.tokens)} tokens"
    if so_far.total is None:
        return Number("Steps", f"{so_far.step:,}", tokens)
    share = f"{100 * so_far.step // so_far.total} % of {so_far.total:,}"
    return Number("Steps", f"{so_far.step:,}", ", ".join(filter(None, [share, tokens])))


def _time(run: Run) -> Number:
    so_far = progress(run)
    if so_far.seconds is None:
        return Number("Time", _UNKNOWN, "not recorded")
    detail = "without the time between attempts"
    if so_far.remaining:
        detail = f"about {duration(so_far.remaining)} left"
    return Number("Time", duration(so_far.seconds), detail)


def _parameters(run: Run) -> Number:
    total, active = (run.facts.get(f"num_{kind}parameters") for kind in ("", "active_"))
    if not isinstance(total, int) or not isinstance(active, int):
        return Number("Parameters", _UNKNOWN)
    return Number("Parameters", short(total), f"{short(active)} active per token")


def _curve(run: Run, label: str, name: str, unit: str) -> Number:
    known = finite(run, name)
    if not len(known):
        reported = len(run.series.get(name, known))
        why = "never finite" if reported else "none was reported"
        return Number(label, _UNKNOWN, why, warns=bool(reported) and name != BITS_PER_BYTE)
    best = int(np.argmin(known.values))
    detail = f"lowest {readable(known.values[best])} at step {known.steps[best]:,}"
    is_lost = bool(run.series[name].steps[-1] != known.steps[-1])
    if is_lost:
        detail = f"at step {known.steps[-1]:,}, later not finite; {detail}"
    value = float(known.values[-1])
    return Number(
        label,
        readable(value),
        ", ".join(filter(None, [unit, detail])),
        value,
        basis=loss_basis(run, name, int(known.steps[-1])),
        warns=is_lost,
    )


def at_equal_tokens(runs: Sequence[Run]) -> list[Number]:
    """Return each run's last validation up to where the shortest run had its last one."""
    label, by_run = "Validation loss at equal tokens", [finite(run, VALIDATION) for run in runs]
    by_tokens = [
        over(series, tokens_by_step(run)) for run, series in zip(runs, by_run, strict=True)
    ]
    end = min((int(series.steps[-1]) for series in by_tokens if len(series)), default=0)
    numbers = []
    for run, series, tokens in zip(runs, by_run, by_tokens, strict=True):
        i = int(np.searchsorted(tokens.steps, end, side="right")) - 1
        if i < 0:
            numbers.append(Number(label, _UNKNOWN, "none was reported"))
            continue
        value, step = float(tokens.values[i]), int(series.steps[i])
        detail = f"after {short(float(tokens.steps[i]))} tokens, step {step:,}"
        basis = loss_basis(run, VALIDATION, step)
        numbers.append(Number(label, readable(value), detail, value, basis=basis))
    return numbers


def loss_basis(run: Run, name: str, step: int) -> tuple[object, ...]:
    """Return what losses must have in common to compare: text, tokens, and how many were read."""
    data = ["data.train", "train.label_smoothing"]
    if name != "loss":
        data = ["data.valid", "evaluation.sequences"]
    settings = [*data, "model.objective", "data.sequence_length"]
    if name != BITS_PER_BYTE:
        settings.append("model.vocab_size")
    read = tokens_by_step(run)
    tokens = np.interp(step, read.steps, read.values) if len(read) else step
    return (*(str(run.setting(setting)) for setting in settings), float(tokens))


def _speed(run: Run) -> Number:
    known = finite(run, "tokens_per_second")
    if not len(known):
        return Number("Tokens per second", _UNKNOWN, "none was reported")
    value = float(np.median(known.values))
    peak = peak_flops(str(run.facts.get("device")), str(run.setting("train.precision")))
    flops, world_size = run.facts.get("flops_per_token"), run.facts.get("world_size")
    detail = "median, all ranks together"
    if peak and isinstance(flops, int | float) and isinstance(world_size, int) and world_size > 0:
        detail += f"; {value * flops / (world_size * peak):.1%} of peak FLOPs"
    return Number("Tokens per second", short(value), detail, value, "high", _hardware(run))


def _communication(run: Run) -> Number:
    known = finite(run, "communication_share")
    if not len(known) or run.facts.get("world_size") == 1:
        return Number("Communication share", _UNKNOWN, "no other ranks, or none reported")
    value = float(np.median(known.values))
    detail = "of step time spent in collectives, median"
    return Number("Communication share", f"{value:.0%}", detail, value, basis=_hardware(run))


def _hardware(run: Run) -> tuple[str, str]:
    return str(run.facts.get("device")), str(run.facts.get("world_size"))


def _straggler(run: Run) -> Number:
    rank, detail = most_often_slowest(run)
    if not rank or run.facts.get("world_size") == 1:
        return Number("Slowest rank", _UNKNOWN, "no other ranks, or none reported")
    name, _, host = rank.partition(" (")
    return Number("Slowest rank", name, f"on {host.rstrip(')')}, {detail}")


def _dead_experts(run: Run) -> Number:
    dead = dead_experts(run)
    if not dead:
        return Number("Dead experts", _UNKNOWN, "no routing was reported")
    count, total = (sum(numbers) for numbers in zip(*dead.values(), strict=True))
    drops = [series.finite() for series in run.routing.get("drop_share", {}).values()]
    worst = max((float(series.values[-1]) for series in drops if len(series)), default=0.0)
    where = ", ".join(f"{name} {mine:,} of {of:,}" for name, (mine, of) in dead.items() if mine)
    detail = "; ".join(filter(None, [where, f"in the last report; largest drop share {worst:.1%}"]))
    text = f"{count:,} of {total:,}" if total else f"{count:,}"
    basis = tuple((name, of) for name, (_, of) in dead.items())
    return Number("Dead experts", text, detail, float(count), basis=basis, warns=count > 0)


def dead_experts(run: Run) -> dict[str, tuple[int, int]]:
    """Return the experts without a token in the last report, and all, by name of the router.

    Applications of a router in different layers and repeats count separately. The number of all
    is 0 if the run did not record it.
    """
    found: dict[str, tuple[int, int]] = {}
    for call, series in run.routing.get("dead_experts", {}).items():
        known, size = series.finite(), run.router_size(call.router)
        if len(known):
            dead, total = found.get(call.router, (0, 0))
            more = num_experts(size) if size else 0
            found[call.router] = dead + int(known.values[-1]), total + more
    return found


def _restarts(run: Run) -> Number:
    count = num_restarts(run)
    causes = [str(attempt.get("cause")) for attempt in run.attempts if attempt.get("restarts")]
    detail = f"last: {causes[-1]}" if causes else "uninterrupted"
    if count and not causes:
        detail = f"last after step {run.starts[-1]:,}" if len(run.starts) > 1 else ""
    return Number("Restarts", str(count), detail, float(count))
