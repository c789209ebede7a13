"""Optimizers, and which parameters they treat alike."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import nn

from moa_dist.config.run import OptimizerConfig
from moa_dist.models.parameter_roles import Role, parameter_roles
from moa_dist.train.muon import Muon


def parameter_groups(
    model: nn.Module, config: OptimizerConfig, expert_names: Set[str] = frozenset()
) -> list[dict[str, Any]]:
    """Group parameters that are updated alike; those of `expert_names` come last, by themselves."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    parameters = dict(model.named_parameters())
    for name, role in parameter_roles(model).items():
        decays = config.decay == "all" or role is not Role.VECTOR
        options = {
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_factor": config.router_lr if role is Role.ROUTER else 1.0,
            "muon": config.kind == "muon" and role is Role.MATRIX,
            "experts": name in expert_names,
        }
        group = groups.setdefault(tuple(options.values()), {"params": [], **options})
        group["params"].append(parameters[name])
    return sorted(groups.values(), key=lambda group: bool(group["experts"]))


def make_optimizer(
    config: OptimizerConfig, groups: list[dict[str, Any]], *, fused: bool = False
) -> torch.optim.Optimizer:
    """Make the optimizer of `parameter_groups`; ZeRO partitions its state.

    With `fused`, AdamW updates many parameters in one kernel on GPUs, and reads and writes each
    element once on CPUs.
    """
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    if config.kind == "muon":
        return Muon(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            momentum=config.muon_momentum,
        )
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group, relative to `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
