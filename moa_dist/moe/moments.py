"""Running mean and variance of logits, as of batch normalization (Ioffe and Szegedy 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moa_dist.moe.initialize import Constant, Initializer

_MOMENTUM = 0.1
"""Share of a step in the running statistics."""


class RunningMoments(nn.Module):
    """Mean and variance of each channel [C], over tokens and the experts that a channel scores.

    Both are buffers: part of the model's state, equal on all ranks, but not trained.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, num_groups: int, num_heads: int, num_experts: int) -> None:
        """Keep C = `num_groups` x `num_heads` channels, each of `num_experts` logits per token."""
        super().__init__()
        self.num_groups, self.num_experts = num_groups, num_experts
        self.register_buffer("mean", torch.empty(num_groups * num_heads))
        self.register_buffer("variance", torch.empty(num_groups * num_heads))

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of each tensor."""
        return {"mean": Constant(0.0), "variance": Constant(1.0)}

    @torch.no_grad()
    def update(self, moments: Tensor, pairs: Tensor) -> None:
        """Follow a step's sums `moments` [2 C] fp64 of logits and of their squares.

        `pairs` [] int64 counts pairs of a token and a router group. Call it once per optimizer step
        with the sums over all ranks, so that all ranks stay equal. A step without tokens changes
        nothing.
        """
        count = (pairs // self.num_groups * self.num_experts).clamp(min=2)
        mean, variance = mean_and_variance(moments, count)
        unbiased = variance * count / (count - 1)
        share = _MOMENTUM * (pairs > 0).to(self.mean.dtype)
        for running, new in ((self.mean, mean), (self.variance, unbiased)):
            running.lerp_(new.to(running.dtype), share)


def mean_and_variance(moments: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return both [..., C] from sums [..., 2 C] over `count` logits; the variance is biased."""
    mean, square = (moments / count).chunk(2, dim=-1)
    return mean, (square - mean.square()).clamp(min=0)
