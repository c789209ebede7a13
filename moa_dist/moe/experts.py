"""Grouped experts: one weight matrix per expert, applied to rows in expert-major order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moa_dist.kernels.grouped_matmul import grouped_matmul
from moa_dist.moe.initialize import Initializer


class GroupedLinear(nn.Module):
    """Expert e multiplies its rows by `weight[e - first_expert]`; no bias.

    `num_experts` counts all experts, `weight` [E_local, d_in, d_out] holds the contiguous
    range that starts at `first_expert`: all of them until `shard` is called.
    """

    def __init__(self, num_experts: int, d_in: int, d_out: int, init: Initializer) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.first_expert = 0
        self.d_in, self.d_out = d_in, d_out  # kept, since ZeRO 3 empties `weight` between uses
        self.init = init
        self.weight = nn.Parameter(torch.empty(num_experts, d_in, d_out))

    def initializers(self) -> dict[str, Initializer]:
        """How to draw each parameter, expert by expert."""
        return {"weight": self.init}

    def shard(self, first: int, stop: int) -> None:
        """Keep experts [first, stop) only."""
        self.first_expert = first
        self.weight = nn.Parameter(self.weight.detach()[first:stop].clone())

    def macs_per_row(self) -> int:
        """Multiply-accumulates for one row."""
        return self.d_in * self.d_out

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows [A, d_in] in expert-major order, `counts` per local expert -> [A, d_out]."""
        return grouped_matmul(rows, self.weight, counts)
