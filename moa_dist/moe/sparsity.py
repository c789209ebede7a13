"""Sparsity without a fixed number of experts: a coefficient that adapts (ReMoE, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moa_dist.moe.initialize import Constant, Initializer


class SparsityCoefficient(nn.Module):
    """The coefficient of the loss that makes weights sparse.

    `value` [] is a buffer: part of the model's state, equal on all ranks, but not trained.
    """

    value: Tensor

    def __init__(self, initial: float, multiplier: float) -> None:
        super().__init__()
        self.initial, self.multiplier = initial, multiplier
        self.register_buffer("value", torch.empty(()))

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of each tensor."""
        return {"value": Constant(self.initial)}

    @torch.no_grad()
    def update(self, assignments: Tensor, target: Tensor) -> None:
        """Grow if a step made more `assignments` [] int64 than `target` [] int64, else shrink.

        Compared in integers, where no layout rounds differently.
        """
        grown, shrunk = self.value * self.multiplier, self.value / self.multiplier
        self.value.copy_(grown.where(assignments > target, shrunk))
