"""Optimizers of the reference: torch's own, and Muon one whole matrix at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moa_dist.config.run import OptimizerConfig
from moa_dist.models.parameter_roles import Role, parameter_roles


def plain_optimizers(
    model: nn.Module, config: OptimizerConfig, lr: float
) -> list[torch.optim.Optimizer]:
    """Make what updates all parameters of a model on one process at the learning rate `lr`."""
    roles = parameter_roles(model)
    groups = [_group(p, roles[name], config, lr) for name, p in model.named_parameters()]
    if config.kind == "sgd":
        return [torch.optim.SGD(groups, lr=lr, momentum=config.momentum)]
    is_matrix = [config.kind == "muon" and role is Role.MATRIX for role in roles.values()]
    of_adamw = [group for group, matrix in zip(groups, is_matrix, strict=True) if not matrix]
    of_muon = [group for group, matrix in zip(groups, is_matrix, strict=True) if matrix]
    adamw = torch.optim.AdamW(of_adamw, lr=lr, betas=config.betas, eps=config.eps)
    return [adamw, PlainMuon(of_muon, config.muon_momentum)] if of_muon else [adamw]


def _group(
    parameter: nn.Parameter, role: Role, config: OptimizerConfig, lr: float
) -> dict[str, Any]:
    decays = config.decay == "all" or role is not Role.VECTOR
    return {
        "params": [parameter],
        "lr": lr * config.router_lr if role is Role.ROUTER else lr,
        "weight_decay": config.weight_decay if decays else 0.0,
    }


class PlainMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) as its authors describe it, scaled as in Liu et al. 2025."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float) -> None:
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix by itself."""
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                momentum = group["momentum"]
                average.mul_(momentum).add_((1 - momentum) * parameter.grad)
                update = momentum * average + (1 - momentum) * parameter.grad
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                rows, columns = parameter.shape[-2:]
                for weight, matrix in zip(
                    parameter.view(-1, rows, columns), update.view(-1, rows, columns), strict=True
                ):
                    scale = 0.2 * math.sqrt(max(rows, columns))
                    weight -= group["lr"] * scale * _newton_schulz(matrix)


def _newton_schulz(matrix: Tensor) -> Tensor:
    """Bring the singular values of [R, C] near 1 by five steps of x -> ax + bx^3 + cx^5."""
    x = matrix / max(float(matrix.norm()), 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x
