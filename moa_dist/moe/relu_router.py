"""ReMoE's router: a token takes every expert with a positive logit, and so 0 to E of them.

Wang et al. 2024 (arXiv 2412.14711, section 3; code thu-ml/ReMoE). A loss on the weights, whose
coefficient adapts after every step, holds the mean number of experts near `top_k`.

Shapes: T tokens, G router groups, E experts per group, K places for experts, N groups of sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_dist.config.family import ReLURouterConfig
from moa_dist.moe.initialize import Initializer
from moa_dist.moe.router import Choice, Router, Routing
from moa_dist.moe.sparsity import SparsityCoefficient
from moa_dist.moe.statistics import RoutingStatistics, routing_statistics, sum_by_group

_TAKEN = ("took_none", "took_fewer", "took_top_k", "took_up_to_twice", "took_more")
"""Shares of tokens by the number of experts they take, compared with `top_k`."""


class ReLURouter(Router):
    """Weights are `relu(logits)`, neither normalized nor limited in number."""

    config: ReLURouterConfig
    weighs_tokens = False  # sparsity is a mean over tokens that count alike

    def __init__(
        self,
        config: ReLURouterConfig,
        d_model: int,
        *,
        num_groups: int = 1,
        init: Initializer | None = None,
    ) -> None:
        super().__init__(config, d_model, num_groups=num_groups, init=init)
        self.sparsity = SparsityCoefficient(config.sparsity, config.sparsity_multiplier)
        self.mean_names = (*_TAKEN, "empty_places", "sparsity_coefficient")

    def _route(
        self,
        logits: Tensor,
        token_mask: Tensor | None,
        num_sequence_groups: int,
        choice: Choice | None,
    ) -> Routing:
        """Implement `Router._route`: the places of a token hold its largest logits."""
        logits = logits.unflatten(-1, (self.num_groups, self.config.num_experts))
        scores = logits.relu()
        positive = scores.detach() > 0
        if token_mask is not None:
            positive = positive & token_mask[:, None, None]
        if choice is None:
            places = self.config.experts_per_token(self.training).most
            chosen_ids = scores.detach().topk(places, dim=-1).indices
            assigned = keep_mask = positive.gather(-1, chosen_ids)
        else:
            assert choice.assigned is not None
            assert choice.keep_mask is not None
            chosen_ids = choice.topk_ids - self._group_offset(logits.device)
            assigned, keep_mask = choice.assigned, choice.keep_mask
        chosen = scores.gather(-1, chosen_ids)
        if choice is None and self.config.capacity is not None:
            keep_mask = self._within_capacity(
                chosen_ids, chosen, token_mask, num_sequence_groups, assigned
            )
        statistics = routing_statistics(
            logits, chosen_ids, keep_mask, token_mask, num_sequence_groups, assigned
        )
        statistics = statistics.reporting(self._reported(assigned), token_mask)
        weights = scores if token_mask is None else scores * token_mask[:, None, None]
        return Routing(
            topk_ids=chosen_ids + self._group_offset(logits.device),
            topk_weights=self._scaled(chosen),
            keep_mask=keep_mask,
            statistics=statistics._replace(probability=sum_by_group(weights, num_sequence_groups)),
            assigned=assigned,
        )

    def _reported(self, assigned: Tensor) -> Tensor:
        """Return what `mean_names` says of each token: [T, G, K] bool -> [T, P]."""
        taken, top_k, places = assigned.sum(-1), self.config.top_k, assigned.shape[-1]
        classes = (
            taken == 0,
            (taken > 0) & (taken < top_k),
            taken == top_k,
            (taken > top_k) & (taken <= 2 * top_k),
            taken > 2 * top_k,
        )
        assert self.sparsity is not None
        coefficient = self.sparsity.value.detach().float().expand(len(taken))
        of_tokens = [x.float().mean(1) for x in (*classes, 1 - taken / places)]
        return torch.stack([*of_tokens, coefficient], dim=1)

    def losses(self, statistics: RoutingStatistics) -> dict[str, Tensor]:
        """Add the loss of sparsity to those of `Router.losses`.

        `E / K * sum_e f_e R_e`, where f_e is the share of tokens that take expert e and R_e their
        mean weight (equation 11 of the paper, weighted by load as in its code).
        """
        tokens = statistics.num_tokens.clamp(min=1)[..., None, None]
        share = statistics.load.to(statistics.probability.dtype) / tokens
        of_experts = share * statistics.probability / tokens
        density = of_experts.sum(-1).mean() * (self.config.num_experts / self.config.top_k)
        assert self.sparsity is not None
        # fp32 by intent; a copy, since it changes in place before it is reported.
        coefficient = self.sparsity.value.detach().clone().to(density.dtype)
        return super().losses(statistics) | {"sparsity": coefficient * density}
