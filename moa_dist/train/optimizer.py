"""Optimizer and learning rate schedule; the rate is a function of the step, not a state."""

from __future__ import annotations

import math
from typing import Any

import torch

from moa_dist.config.run import OptimizerConfig, ScheduleConfig


def make_optimizer(
    config: OptimizerConfig, parameter_groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Make torch's own AdamW or SGD; ZeRO partitions their state."""
    if config.kind == "sgd":
        return torch.optim.SGD(
            parameter_groups,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(
        parameter_groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def learning_rate(step: int, peak: float, config: ScheduleConfig, num_steps: int) -> float:
    """Compute the rate of a step from 1 to `num_steps`.

    Warm-up: linear from `warmup_start` to 1 (times the peak), reached at step `warmup_steps`.
    Then constant, a half cosine down to `final` at the last step, or `sqrt(warmup / step)`
    (Vaswani et al. 2017, section 5.3).
    """
    warmup = config.warmup_steps
    if step < warmup:
        return peak * (config.warmup_start + (1 - config.warmup_start) * step / warmup)
    match config.kind:
        case "constant":
            return peak
        case "cosine":
            progress = (step - warmup) / max(num_steps - warmup, 1)
            return peak * (
                config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2
            )
        case "inverse_sqrt":
            return peak * math.sqrt(max(warmup, 1) / step)
