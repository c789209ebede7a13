"""Balance without a loss: a bias per expert that moves against the load of the last step.

Wang et al. 2024 (arXiv 2408.15664); DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moa_dist.moe.initialize import Constant, Initializer


class SelectionBias(nn.Module):
    """Added to the scores by which experts are chosen, never to those by which they are weighed.

    `value` [G, E] is a buffer: state of the model, equal on all ranks, but not trained. DeepSpeed
    casts parameters only, so it stays in fp32 where the model computes in bf16, whose 8 bits would
    lose small steps.
    """

    value: Tensor

    def __init__(self, num_groups: int, num_experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("value", torch.empty(num_groups, num_experts))

    def initializers(self) -> dict[str, Initializer]:
        """How to draw each tensor."""
        return {"value": Constant(0.0)}

    def forward(self, scores: Tensor) -> Tensor:
        """[T, G, E] -> [T, G, E], in fp32 or wider."""
        return scores + self.value

    @torch.no_grad()
    def update(self, load: Tensor) -> None:
        """Move each bias by `rate`: up below the mean of `load` [G, E] int64, down above it.

        Once per optimizer step, with the load of all its tokens on all ranks: then all ranks
        stay equal.
        """
        num_experts = load.shape[-1]
        # Compared in integers, where no layout rounds differently.
        direction = (load.sum(-1, keepdim=True) - num_experts * load).sign()
        self.value += self.rate * direction.to(self.value.dtype)
