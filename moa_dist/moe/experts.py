"""Grouped experts: one weight matrix per expert, applied to rows in expert-major order.

Shapes: A rows, E experts in all, E_local of them on this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moa_dist.kernels.grouped_matmul import grouped_matmul
from moa_dist.moe.initialize import Initializer


class GroupedLinear(nn.Module):
    """Expert e multiplies its rows by `weight[e - first_expert]`; no bias.

    `num_experts` counts all experts, `weight` [E_local, d_in, d_out] holds the contiguous
    range that starts at `first_expert`: all of them until `shard` is called. `gather`, if set,
    turns the weights of this rank into those of all experts [E, d_in, d_out].
    """

    def __init__(self, num_experts: int, d_in: int, d_out: int, init: Initializer) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gather: Callable[[Tensor], Tensor] | None = None
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

    def forward(self, rows: Tensor | None, counts: list[int]) -> Tensor:
        """Rows [A, d_in] in expert-major order, `counts` per local expert -> [A, d_out].

        Without rows, the gathered weights. Both are calls of this module, for ZeRO 3 gathers
        parameters call by call.
        """
        if rows is None:
            assert self.gather is not None
            return self.gather(self.weight)
        return grouped_matmul(rows, self.weight, counts)
