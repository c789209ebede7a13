"""GShard's router (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1), as DeepSpeed has it.

Its loss counts first choices, and what capacity drops leaves its weight to a token's other choices.

Shapes: T tokens, G router groups, E experts per group, K choices, N groups of sequences.
"""

from __future__ import annotations

from torch import Tensor

from moa_dist.config.family import GShardRouterConfig
from moa_dist.moe.router import GATES, Choice, Router, Routing
from moa_dist.moe.statistics import RoutingStatistics


class GShardRouter(Router):
    """The top K of a softmax."""

    config: GShardRouterConfig

    def _route(
        self,
        logits: Tensor,
        token_mask: Tensor | None,
        num_sequence_groups: int,
        choice: Choice | None,
    ) -> Routing:
        """Implement `Router._route`; counts first choices [N, G * E]."""
        routing = super()._route(logits, token_mask, num_sequence_groups, choice)
        weights = routing.topk_weights
        if self.config.capacity is not None:
            assert routing.keep_mask is not None
            weights = self._scaled(GATES["renormalized"](weights * routing.keep_mask))
        first = routing.topk_ids[:, :, 0].unflatten(0, (num_sequence_groups, -1)).flatten(1)
        real = first.new_ones(first.shape)
        if token_mask is not None:
            real = token_mask[:, None].expand(-1, self.num_groups).reshape(first.shape).long()
        counts = first.new_zeros(num_sequence_groups, self.num_experts).scatter_add(1, first, real)
        statistics = routing.statistics._replace(own=counts)
        return routing._replace(topk_weights=weights, statistics=statistics)

    def losses(self, statistics: RoutingStatistics) -> dict[str, Tensor]:
        """Add the loss of first choices to those of `Router.losses`."""
        losses = super().losses(statistics)
        if not self.config.first_choice:
            return losses
        assert statistics.own is not None
        probability = statistics.mean_probability
        share = statistics.own / statistics.num_tokens.clamp(min=1)[..., None].to(probability)
        of_experts = share.unflatten(-1, (self.num_groups, -1)) * probability
        loss = self.config.num_experts * of_experts.sum(-1).mean()
        return losses | {"first_choice": self.config.first_choice * loss}
