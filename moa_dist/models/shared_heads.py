"""Heads that every token uses, next to those that it is routed to.

Shapes: B sequences of T queries, D model width, n shared experts of h heads, d head width.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from moa_dist.models.linear import Linear
from moa_dist.moe.initialize import XavierUniform


class SharedHeads(nn.Module):
    """Query and output projections of experts that are always on, drawn as those of MoA.

    Keys and values are those of the layer. Whoever weighs these heads multiplies what attention
    returns for them, as the output projection is linear.
    """

    def __init__(self, num_experts: int, width: int, d_model: int) -> None:
        """Build `num_experts` of `width` h * d each."""
        super().__init__()
        self.num_experts = num_experts
        # All of them are one matrix, but as large as an expert's own.
        all_wide = d_model + num_experts * width
        init = XavierUniform(gain=math.sqrt(all_wide / (d_model + width)))
        self.q = Linear(d_model, num_experts * width, init)
        self.o = Linear(num_experts * width, d_model, init)

    def macs(self, length: int) -> int:
        """Count multiply-accumulates of both projections for `length` tokens."""
        return self.q.macs(length) + self.o.macs(length)

    def queries(self, x: Tensor, num_heads: int) -> Tensor:
        """x [B, T, D] -> [B, T, n, h, d], for h = `num_heads`."""
        return self.q(x).unflatten(-1, (self.num_experts, num_heads, -1))

    def outputs(self, heads: Tensor) -> Tensor:
        """Heads [B, T, n, h, d] -> [B, T, D]."""
        return self.o(heads.flatten(2))
