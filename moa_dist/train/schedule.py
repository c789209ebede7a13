"""The learning rate schedule: the rate is a function of the step, not a state."""

from __future__ import annotations

import math
from collections.abc import Callable

from moa_dist.config.run import DecayShape, ScheduleConfig


def learning_rate(step: int, peak: float, config: ScheduleConfig, num_steps: int) -> float:
    """Compute the rate of a step from 1 to `num_steps`.

    Warm-up: linear from `warmup_start` to 1 (times the peak), reached at step `warmup_steps`.
    Then constant, a half cosine down to `final` at the last step, `sqrt(warmup / step)`
    (Vaswani et al. 2017, section 5.3), or constant with a decay at the end (Hu et al. 2024,
    section 4; Haegele et al. 2024). Or else the phases of the configuration.
    """
    if config.kind == "phases":
        return peak * _in_phases(step, config, num_steps)
    warmup = config.warmup_steps
    if step < warmup:
        return peak * (config.warmup_start + (1 - config.warmup_start) * step / warmup)
    match config.kind:
        case "constant":
            return peak
        case "cosine":
            progress = (step - warmup) / max(num_steps - warmup, 1)
            return peak * _between(1, config.final, "cosine", progress)
        case "inverse_sqrt":
            return peak * math.sqrt(max(warmup, 1) / step)
        case "wsd":
            progress = 1 - (num_steps - step) / max(config.decay_steps, 1)
            return peak * _between(1, config.final, config.decay_shape, max(progress, 0))


def _in_phases(step: int, config: ScheduleConfig, num_steps: int) -> float:
    """Return the fraction of the peak; each phase starts where the one before ended."""
    left = num_steps - sum(phase.steps or 0 for phase in config.phases)
    start, value = 0, config.warmup_start
    for phase in config.phases:
        length = left if phase.steps is None else phase.steps
        if step < start + length:
            return _between(value, phase.to, phase.shape, (step - start) / length)
        start, value = start + length, phase.to
    return value


_REMAINING: dict[DecayShape, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}
"""Share of the way that remains, by shape, for a progress from 0 to 1."""


def _between(start: float, end: float, shape: DecayShape, progress: float) -> float:
    return end + (start - end) * _REMAINING[shape](progress)
