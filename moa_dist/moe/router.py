"""The router: chooses the experts of each token and their weights, for attention and FFN alike.

Shapes: B sequences of S tokens, T = B * S tokens, D width of the router's input, G router
groups (SwitchHead routes each head separately, all others have G = 1), E experts per group,
K experts chosen per token and group, N groups of sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from moa_dist.config.routers import GroupLimitConfig, RouterConfig
from moa_dist.moe.bias import SelectionBias
from moa_dist.moe.capacity import keep_within_capacity
from moa_dist.moe.fused_choice import LEAST_SUM, Options, can_fuse, choose
from moa_dist.moe.initialize import Initializer, Normal
from moa_dist.moe.losses import balance_losses
from moa_dist.moe.moments import RunningMoments
from moa_dist.moe.router_logits import RouterLogits
from moa_dist.moe.sparsity import SparsityCoefficient
from moa_dist.moe.statistics import RoutingStatistics, routing_statistics
from moa_dist.moe.token_state import NO_ROUTER_STATE, RouterState
from moa_dist.profiling import annotated


class Routing(NamedTuple):
    """A router's decision for T tokens; the input of a dispatcher."""

    topk_ids: Tensor
    """[T, G, K] int64; flat id `group * E + expert`."""
    topk_weights: Tensor
    """[T, G, K] in fp32 or wider; carries the gradient to the router."""
    keep_mask: Tensor | None
    """[T, G, K] bool, false for padding tokens and dropped assignments; None keeps all."""
    statistics: RoutingStatistics
    """Sums for losses and reports."""
    assigned: Tensor | None = None
    """[T, G, K] bool, false for places that hold no expert; None if all do."""
    state: Tensor | None = None
    """[B, S, R] what the router of the next layer starts from; None unless it is recurrent."""
    head_weights: Tensor | None = None
    """[T, G, H, K] where each of H heads weighs the same experts; `topk_weights` sums over them."""
    by_head: Tensor | None = None
    """[T, G, H, K] bool, which of them each head chose; None where heads do not choose."""

    def choice(self) -> Choice:
        """Return the choice that this routing is based on."""
        return Choice(self.topk_ids, self.keep_mask, self.assigned, self.by_head)

    def reporting(self, values: Tensor, token_mask: Tensor | None) -> Routing:
        """Report `values` [T, P] of tokens, see `RoutingStatistics.reporting`."""
        return self._replace(statistics=self.statistics.reporting(values, token_mask))


class Choice(NamedTuple):
    """What a router chose, which a second pass over the same tokens must not choose again."""

    topk_ids: Tensor
    """As in `Routing`."""
    keep_mask: Tensor | None
    """As in `Routing`."""
    assigned: Tensor | None = None
    """As in `Routing`."""
    by_head: Tensor | None = None
    """[T, G, H, K] bool, which heads chose an expert; None where there are no heads."""


def _renormalize(chosen: Tensor) -> Tensor:
    return chosen / chosen.sum(-1, keepdim=True).clamp(min=LEAST_SUM)


def _renormalize_detached(chosen: Tensor) -> Tensor:
    return chosen / chosen.sum(-1, keepdim=True).clamp(min=LEAST_SUM).detach()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
}
"""Logits [T, G, E] to scores [T, G, E], by `RouterConfig.score`."""

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "raw": lambda chosen: chosen,
    "renormalized": _renormalize,
    "renormalized_detached": _renormalize_detached,
}
"""Chosen scores [T, G, K] to weights [T, G, K], by `RouterConfig.gate`."""


class Router(nn.Module):
    """Scores all experts of each group, chooses K, weights them, drops what exceeds capacity."""

    weighs_tokens: ClassVar[bool] = True
    """Whether statistics count tokens by `RouterState.weight`; else all count alike."""
    of_all_layers: ClassVar[tuple[str, ...]] = ()
    """Names of children that the routers of all layers of a stack have in common."""

    def __init__(
        self,
        config: RouterConfig,
        d_model: int,
        *,
        num_groups: int = 1,
        init: Initializer | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_groups = num_groups
        self.logits = self._make_logits(d_model, init or Normal(1 / math.sqrt(d_model)))
        rate = config.balance.bias_rate
        self.bias = SelectionBias(num_groups, config.num_experts, rate) if rate else None
        """Added to the scores that choose; None without `balance.bias_rate`."""
        self.sparsity: SparsityCoefficient | None = None
        """Coefficient that follows the number of experts taken, if this kind has one."""
        self.running: RunningMoments | None = None
        """Statistics of logits that stand in for those of a batch, if this kind has them."""
        self.mean_names: tuple[str, ...] = ()
        """What is reported of `RoutingStatistics.reported`, as means over tokens."""

    @property
    def num_experts(self) -> int:
        """Number of flat experts: groups times experts per group."""
        return self.num_groups * self.config.num_experts

    def _make_logits(self, d_model: int, init: Initializer) -> nn.Module:
        """Build the map of rows [..., D] to logits [..., outputs]; kinds may have another."""
        return RouterLogits(d_model, self.num_experts, init)

    def macs(self, num_tokens: int) -> int:
        """Count multiply-accumulates of one application."""
        return num_tokens * sum(w.numel() for w in self.logits.parameters() if w.dim() == 2)

    @annotated("router")
    def forward(
        self,
        x_BSD: Tensor,
        token_mask: Tensor | None = None,
        choice: Choice | None = None,
        state: RouterState = NO_ROUTER_STATE,
    ) -> Routing:
        """Route each token, or compute weights and statistics only, with a `choice`.

        `token_mask` [B, S] bool is true for real tokens; padding is not routed or counted.
        """
        return self._decide(x_BSD, token_mask, choice, state)

    def _decide(
        self, x_BSD: Tensor, token_mask: Tensor | None, choice: Choice | None, state: RouterState
    ) -> Routing:
        """Do the work of `forward`. Kinds whose logits depend on more than `x_BSD` override it."""
        return self._by_logits(self.logits(x_BSD), token_mask, choice, state)

    def _by_logits(
        self,
        logits_BSO: Tensor,
        token_mask: Tensor | None,
        choice: Choice | None,
        state: RouterState,
    ) -> Routing:
        """Route by logits [B, S, outputs], in groups of sequences."""
        B, S, _ = logits_BSO.shape
        N, rest = divmod(B, self.config.group_sequences)
        if rest:
            raise ValueError(
                f"a batch of {B} sequences does not split into groups of "
                f"{self.config.group_sequences} (router.group_sequences)"
            )
        logits = logits_BSO.flatten(0, 1)
        token_mask = None if token_mask is None else token_mask.reshape(B * S)
        routing = self._route(logits, token_mask, N, choice)
        if state.weight is None or not self.weighs_tokens:
            return routing
        by_group, weight = logits.unflatten(-1, (self.num_groups, -1)), state.weight.flatten()
        return routing._replace(statistics=routing.statistics.weighed(by_group, weight))

    def losses(self, statistics: RoutingStatistics) -> dict[str, Tensor]:
        """Compute scalar losses of `statistics` by name, each multiplied by its coefficient.

        Statistics of other routers with an equal configuration may be stacked in front.
        """
        return balance_losses(statistics, self.config.balance)

    def _route(
        self,
        logits: Tensor,
        token_mask: Tensor | None,
        num_sequence_groups: int,
        choice: Choice | None,
    ) -> Routing:
        """Route by logits [T, G * E]; `token_mask` [T] bool is true for real tokens."""
        E, N = self.config.num_experts, num_sequence_groups
        if self.config.capacity is None and can_fuse(logits, E):
            routing = self._choose_fused(logits, token_mask, N, choice)
            return routing._replace(topk_weights=self._scaled(routing.topk_weights))
        logits = logits.unflatten(-1, (self.num_groups, E))
        scores = SCORES[self.config.score](logits)
        first = self._group_offset(logits.device)
        if choice is None:
            chosen_ids = self._selectable(scores).topk(self.config.top_k, dim=-1).indices
            chosen = scores.gather(-1, chosen_ids)
            keep_mask = self._keep(chosen_ids, chosen, token_mask, N)
        else:
            chosen_ids, keep_mask = choice.topk_ids - first, choice.keep_mask
            chosen = scores.gather(-1, chosen_ids)
        return Routing(
            topk_ids=chosen_ids + first,
            topk_weights=self._scaled(GATES[self.config.gate](chosen)),
            keep_mask=keep_mask,
            statistics=routing_statistics(logits, chosen_ids, keep_mask, token_mask, N),
        )

    def _choose_fused(
        self,
        logits: Tensor,
        token_mask: Tensor | None,
        num_sequence_groups: int,
        choice: Choice | None,
    ) -> Routing:
        """Do the work of `_route` in few kernels; logits [T, G * E]."""
        config, G = self.config, self.num_groups
        given = None if choice is None else choice.topk_ids
        if config.group_limit is not None and given is None:
            # The kernels know no such limit: they weigh and count what is chosen here.
            grouped = logits.detach().unflatten(-1, (G, -1))
            chosen_ids = self._selectable(SCORES[config.score](grouped)).topk(config.top_k).indices
            given = chosen_ids + self._group_offset(logits.device)
        dropout = config.expert_dropout if self.training and given is None else 0.0
        chosen = choose(
            logits,
            None if self.bias is None else self.bias.value,
            torch.rand_like(logits) if dropout else None,
            token_mask,
            given,
            Options(config.top_k, G, num_sequence_groups, config.score, config.gate, dropout),
        )
        return Routing(
            topk_ids=chosen.ids,
            topk_weights=chosen.weights,
            keep_mask=self._keep(chosen.ids, chosen.weights, token_mask, num_sequence_groups),
            statistics=RoutingStatistics(
                num_tokens=chosen.num_tokens,
                load=chosen.load,
                dropped=chosen.dropped,
                probability=chosen.probability,
                z=chosen.z,
                entropy=chosen.entropy,
            ),
        )

    def _group_offset(self, device: torch.device) -> Tensor:
        """Return the first flat id [G, 1] of each router group."""
        return (torch.arange(self.num_groups, device=device) * self.config.num_experts)[:, None]

    def _scaled(self, weights: Tensor) -> Tensor:
        scale = self.config.route_scale
        return weights if scale == 1 else weights * scale

    def _selectable(self, scores: Tensor) -> Tensor:
        """Return the scores to choose by: detached, biased, without experts that are hidden."""
        scores = scores.detach()
        if self.bias is not None:
            scores = self.bias(scores)
        if self.training and self.config.expert_dropout:
            hidden = torch.rand_like(scores) < self.config.expert_dropout
            scores = scores.masked_fill(hidden, -math.inf)
        limit = self.config.group_limit
        return scores if limit is None else _within_best_groups(scores, limit)

    def _keep(
        self,
        chosen_ids: Tensor,
        chosen: Tensor,
        token_mask: Tensor | None,
        num_sequence_groups: int,
    ) -> Tensor | None:
        """Return `Routing.keep_mask`."""
        if self.config.capacity is None:
            return None if token_mask is None else token_mask[:, None, None].expand_as(chosen_ids)
        return self._within_capacity(chosen_ids, chosen, token_mask, num_sequence_groups)

    def _within_capacity(
        self,
        chosen_ids: Tensor,
        chosen: Tensor,
        token_mask: Tensor | None,
        num_sequence_groups: int,
        assigned: Tensor | None = None,
    ) -> Tensor:
        assert self.config.capacity is not None
        return keep_within_capacity(
            chosen_ids,
            chosen.detach(),
            token_mask,
            top_k=self.config.top_k,
            num_experts=self.config.num_experts,
            num_sequence_groups=num_sequence_groups,
            capacity=self.config.capacity,
            assigned=assigned,
        )


def _within_best_groups(scores: Tensor, limit: GroupLimitConfig) -> Tensor:
    """Hide experts beyond the best groups from `scores` [T, G, E] (DeepSeek-V3, section 2.1.2)."""
    grouped = scores.unflatten(-1, (limit.num_groups, -1))
    best = grouped.topk(2).values.sum(-1).topk(limit.top_groups).indices
    is_hidden = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
    # Experts that dropout hides stay ahead of those of other groups.
    dropped_last = grouped.clamp(min=torch.finfo(scores.dtype).min)
    return dropped_last.masked_fill(is_hidden[..., None], -math.inf).flatten(-2)
