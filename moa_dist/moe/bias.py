"""Balance without a loss: a bias per expert that counteracts the load of the last step.

Wang et al. 2024 (arXiv 2408.15664); DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moa_dist.moe.initialize import Constant, Initializer


class SelectionBias(nn.Module):
    """Added to the scores that choose experts, never to those that weight them.

    `value` [G, E] is a buffer: part of the model's state, equal on all ranks, but not trained.
    DeepSpeed casts parameters only, so it stays in fp32 if the model is in bf16, which would lose
    small steps.
    """

    value: Tensor

    def __init__(self, num_groups: int, num_experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("value", torch.empty(num_groups, num_experts))

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of each tensor."""
        return {"value": Constant(0.0)}

    def forward(self, scores: Tensor) -> Tensor:
        """[T, G, E] -> [T, G, E], in fp32 or wider."""
        return scores + self.value

    @torch.no_grad()
    def update(self, load: Tensor) -> None:
        """Move each bias by `rate`: up below the mean of `load` [G, E] int64, down above it.

        Call it once per optimizer step with the load of all tokens of all ranks, so that all ranks
        stay equal.
        """
        num_experts = load.shape[-1]
        # Compared in integers, where no layout rounds differently.
        direction = (load.sum(-1, keepdim=True) - num_experts * load).sign()
        self.value += self.rate * direction.to(self.value.dtype)
