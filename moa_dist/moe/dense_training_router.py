"""DS-MoE's router: dense in training, sparse in inference (Pan et al. 2024, arXiv 2404.05567).

Every token trains all experts, each weighted by its score; in evaluation it takes the K best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_dist.config.family import DenseTrainingRouterConfig
from moa_dist.moe.router import SCORES, Choice, Router, Routing
from moa_dist.moe.statistics import routing_statistics


class DenseTrainingRouter(Router):
    """All experts in training, `top_k` in evaluation."""

    config: DenseTrainingRouterConfig

    def _route(
        self,
        logits: Tensor,
        token_mask: Tensor | None,
        num_sequence_groups: int,
        choice: Choice | None,
    ) -> Routing:
        """Implement `Router._route`; in training there is nothing to choose."""
        if not self.training:
            return super()._route(logits, token_mask, num_sequence_groups, choice)
        logits = logits.unflatten(-1, (self.num_groups, self.config.num_experts))
        every = torch.arange(self.config.num_experts, device=logits.device).expand_as(logits)
        keep_mask = None if token_mask is None else token_mask[:, None, None].expand_as(logits)
        return Routing(
            topk_ids=every + self._group_offset(logits.device),
            topk_weights=self._scaled(SCORES[self.config.score](logits)),
            keep_mask=keep_mask,
            statistics=routing_statistics(
                logits, every, keep_mask, token_mask, num_sequence_groups
            ),
        )
