"""Monet's router: each head keeps the experts whose logits stand out, at least one.

Park et al. 2024 (arXiv 2412.04139, section 3; code dmis-lab/Monet). A logit is kept if, normalized,
it reaches the value that K of E draws from a normal distribution exceed. Training normalizes by the
mean and variance over all experts and all tokens of the group of sequences, future tokens included.
Evaluation uses running statistics instead, so a token's experts depend on it alone.

Shapes: T tokens, G router groups, H heads, E experts per group, N groups of sequences.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor, nn

from moa_dist.config.family import ThresholdRouterConfig
from moa_dist.moe.initialize import Initializer
from moa_dist.moe.moments import RunningMoments, mean_and_variance
from moa_dist.moe.router import Choice, Router, Routing
from moa_dist.moe.router_logits import RouterLogits
from moa_dist.moe.statistics import routing_statistics, sum_by_group

_EPS = 1e-5
"""Added to the variance, as in batch normalization."""


class ThresholdRouter(Router):
    """Heads weigh the same experts, each by a softmax over those that it keeps.

    A token's experts are those that any of its heads keeps.
    """

    config: ThresholdRouterConfig
    weighs_tokens = False  # as in the running statistics

    def __init__(
        self,
        config: ThresholdRouterConfig,
        d_model: int,
        *,
        num_groups: int = 1,
        init: Initializer | None = None,
    ) -> None:
        super().__init__(config, d_model, num_groups=num_groups, init=init)
        self.running = RunningMoments(num_groups, config.num_heads, config.num_experts)
        self.threshold = NormalDist().inv_cdf(1 - config.top_k / config.num_experts)

    def _make_logits(self, d_model: int, init: Initializer) -> nn.Module:
        """Implement `Router._make_logits`: those of all heads."""
        return RouterLogits(d_model, self.config.num_heads * self.num_experts, init)

    def _route(
        self,
        logits: Tensor,
        token_mask: Tensor | None,
        num_sequence_groups: int,
        choice: Choice | None,
    ) -> Routing:
        """Implement `Router._route`: a token has a place for every expert."""
        N, G, H = num_sequence_groups, self.num_groups, self.config.num_heads
        by_channel = logits.unflatten(-1, (G * H, self.config.num_experts))
        every = torch.arange(self.config.num_experts, device=logits.device).expand_as(by_channel)
        of_heads = routing_statistics(by_channel, every, None, token_mask, N)
        moments = _moments(by_channel.detach(), token_mask, N)
        if choice is None:
            by_head = self._kept(by_channel.detach(), moments, of_heads.num_tokens)
            by_head = by_head.unflatten(1, (G, H))
        else:
            assert choice.by_head is not None
            by_head = choice.by_head
        weights = by_channel.unflatten(1, (G, H)).masked_fill(~by_head, -math.inf).softmax(-1)
        chosen = by_head.any(2)
        if token_mask is not None:
            chosen = chosen & token_mask[:, None, None]
        load = sum_by_group(chosen.long(), N)
        statistics = of_heads._replace(
            load=load,
            dropped=torch.zeros_like(load),
            # Heads choose among the same experts: what counts is their mean.
            probability=of_heads.probability.unflatten(1, (G, H)).mean(2),
            z=of_heads.z.unflatten(1, (G, H)).mean(2),
            entropy=of_heads.entropy.unflatten(1, (G, H)).mean(2),
            own=moments,
        )
        return Routing(
            topk_ids=every[:, ::H] + self._group_offset(logits.device),
            topk_weights=self._scaled(weights.sum(2)),
            keep_mask=chosen,
            statistics=statistics,
            assigned=chosen,
            head_weights=self._scaled(weights),
            by_head=by_head,
        )

    def _kept(self, logits: Tensor, moments: Tensor, num_tokens: Tensor) -> Tensor:
        """Return which of `logits` [T, G * H, E] reach the threshold, or are largest: bool."""
        assert self.running is not None
        if self.training:
            count = (num_tokens * self.config.num_experts).clamp(min=1)
            mean, variance = mean_and_variance(moments, count[:, None])
        else:
            mean, variance = self.running.mean[None], self.running.variance[None]
        of_groups = logits.unflatten(0, (len(moments), -1))
        mean, scale = (x[:, None, :, None] for x in (mean, (variance + _EPS).rsqrt()))
        normalized = ((of_groups - mean) * scale).flatten(0, 1)
        return normalized >= normalized.amax(-1, keepdim=True).clamp(max=self.threshold)


def _moments(logits: Tensor, token_mask: Tensor | None, num_sequence_groups: int) -> Tensor:
    """Sum `logits` [T, C, E] and their squares over real tokens and experts: [N, 2 C]."""
    if token_mask is not None:
        logits = logits * token_mask[:, None, None]
    sums = torch.cat([logits.sum(-1), logits.square().sum(-1)], dim=1)
    return sum_by_group(sums, num_sequence_groups)
