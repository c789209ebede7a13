"""MoA: mixture of attention heads (Zhang et al. 2022, arXiv 2210.05144, section 3).

An expert is a query projection and an output projection. Each query token routes to K experts; keys
and values are shared by all. Ranks exchange only what goes into and comes out of projections: the
softmax runs where the token's sequence is.

Shapes: B sequences, T queries, S keys, K chosen experts, h heads per expert, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.config.model import MoAConfig
from moa_dist.kernels.row_map import ExpertWeights
from moa_dist.models.attention import (
    Attention,
    AttentionOutput,
    head_norm,
    traced,
)
from moa_dist.models.cache import KeyValues, extended
from moa_dist.models.linear import Bias, Linear
from moa_dist.models.mask import AttentionMask
from moa_dist.models.rope import apply_rope
from moa_dist.models.shared_heads import SharedHeads
from moa_dist.models.softmax import softmax_attention, softmax_macs
from moa_dist.models.stick_breaking import log_stick_shares, stick_breaking_attention
from moa_dist.models.trace import LogShares, log_softmax_shares
from moa_dist.moe.experts import GroupedLinear
from moa_dist.moe.initialize import Normal, XavierUniform
from moa_dist.moe.routed_module import NOTHING_GATHERED, Gathered, RoutedModule, RoutedProjection
from moa_dist.moe.router import Router, Routing
from moa_dist.moe.router_kinds import make_router
from moa_dist.profiling import annotated


class Attend(NamedTuple):
    """A way from queries and keys to a sum of values."""

    value: Callable[[Tensor, Tensor, Tensor, AttentionMask, float | None], Tensor]
    """Sums values, as `softmax_attention` does."""
    log_shares: LogShares
    """The same as attention, for traces."""


ATTEND: dict[str, Attend] = {
    "softmax": Attend(softmax_attention, log_softmax_shares),
    "stick_breaking": Attend(stick_breaking_attention, log_stick_shares),
}
"""By the name that a configuration uses."""


class MoAAttention(RoutedModule, Attention):
    """`y_t = sum over chosen e of w_e W_o^e attention(W_q^e x_t, K, V)` (equations 5-8).

    The two round trips, for queries and for outputs, share one dispatch plan.
    """

    def __init__(self, config: MoAConfig, d_model: int, init_scale: float) -> None:
        super().__init__()
        self.config = config
        width = config.heads_per_expert * config.d_head
        num_experts = config.router.num_experts
        shared = XavierUniform(gain=1 / math.sqrt(2))
        # Small and random, not zero: with all logits tied every token takes the same experts.
        init = Normal(init_scale / math.sqrt(d_model))
        self.router = make_router(config.router, d_model, init=init)
        self.q = GroupedLinear(num_experts, d_model, width, XavierUniform())
        self.k = Linear(d_model, width, shared, bias=config.kv_bias)
        self.v = Linear(d_model, width, shared, bias=config.kv_bias)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        self.o = GroupedLinear(num_experts, width, d_model, XavierUniform())
        self.shared = (
            SharedHeads(config.shared_experts, width, d_model) if config.shared_experts else None
        )
        self.bias = Bias(d_model) if config.output_bias else None

    @property
    def num_heads(self) -> int:
        """Heads of all experts; head `expert * heads_per_expert + i` is the i-th of one.

        Shared experts come last.
        """
        num_experts = self.config.router.num_experts + self.config.shared_experts
        return num_experts * self.config.heads_per_expert

    def routers(self) -> dict[str, Router]:
        """The only router, which routes queries."""
        return {"query": self.router}

    def macs(self, length: int, num_keys: int | None = None) -> dict[str, int]:
        """Implement `Attention.macs`."""
        K, shared = self.config.router.top_k, self.config.shared_experts
        width = self.config.heads_per_expert * self.config.d_head
        dense = [self.k, self.v, *(() if self.shared is None else (self.shared,))]
        return {
            "projections": sum(projection.macs(length) for projection in dense),
            "experts": length * K * (self.q.macs_per_row() + self.o.macs_per_row()),
            "routers": self.router.macs(length),
            "softmax": softmax_macs(length, num_keys or length, (K + shared) * width),
        }

    def routed_projections(self) -> list[RoutedProjection]:
        """Implement `RoutedModule.routed_projections`."""
        D, width = self.q.d_in, self.q.d_out
        return [
            RoutedProjection("router", ("q",), "token", D, "slot", width, weighted=False),
            RoutedProjection("router", ("o",), "slot", width, "token", D, weighted=True),
        ]

    @annotated("attention")
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        gathered: Gathered = NOTHING_GATHERED,
        cache: KeyValues | None = None,
        trace: bool = False,
    ) -> AttentionOutput:
        """Implement `Attention.forward`; at padding, y has no part of routed experts."""
        B, T, D = query.shape
        routing = self.router(query, mask.query_mask)
        K, h = routing.topk_ids.shape[-1], self.config.heads_per_expert
        plan = self.dispatcher.plan(routing, self.router.num_experts)

        # Keys and values are computed while rows are in flight.
        sent = plan.dispatch(query.reshape(B * T, D), "token")
        k = self.k(key).unflatten(-1, (h, -1)).transpose(1, 2)
        experts = ExpertWeights(self.expert_weights("q", gathered))
        returning = plan.run_and_combine(experts, sent, "token", "slot", weighted=False)
        v = self.v(value).unflatten(-1, (h, -1)).transpose(1, 2)
        shared = None if self.shared is None else self.shared.queries(query, h)
        q = returning.wait().view(B, T, K, h, -1)
        if shared is not None:
            q = torch.cat([q, shared.to(q.dtype)], 2)
        num_used = q.shape[2]
        # The heads of one place in an expert share its keys and values, whatever the slot: they
        # are brought together, [B, h * experts used, T, d].
        q = q.permute(0, 3, 2, 1, 4).flatten(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = (apply_rope(x, self.config.rope, mask.rotation) for x in (q, k))
        if cache is not None:
            k, v = cache = extended(cache, k, v)
        attend = ATTEND[self.config.attend].value
        heads = attend(q, k, v, mask, self.config.soft_cap)
        heads = heads.to(query.dtype)  # autocast narrows it

        heads = heads.unflatten(1, (h, num_used)).permute(0, 3, 2, 1, 4)  # [B, T, used, h, d]
        slots = heads[:, :, :K].reshape(B * T * K, -1)
        experts = ExpertWeights(self.expert_weights("o", gathered))
        sent = plan.dispatch(slots, "slot")
        of_shared = None if self.shared is None else self.shared.outputs(heads[:, :, K:])
        y = plan.run_and_combine(experts, sent, "slot", "token", weighted=True).wait().view(B, T, D)
        if of_shared is not None:
            y = y + of_shared
        if self.bias is not None:
            y = self.bias(y)
        decided = None
        if trace:
            # In slot-major order, as `_head_ids` has them.
            q = q.unflatten(1, (h, num_used)).transpose(1, 2).flatten(1, 2)
            k = k.repeat(1, num_used, 1, 1)
            ids, soft_cap = self._head_ids(routing, B), self.config.soft_cap
            shares = ATTEND[self.config.attend].log_shares
            decided = traced({"query": routing}, q, k, mask, ids, soft_cap, shares)
        return AttentionOutput(y, {"query": routing.statistics}, cache, decided)

    def _head_ids(self, routing: Routing, num_sequences: int) -> Tensor:
        """Return `HeadTrace.head_ids`: the heads of the expert in each slot, then shared ones."""
        h, T = self.config.heads_per_expert, len(routing.topk_ids)
        head_TKh = routing.topk_ids[..., None] * h + torch.arange(h, device=routing.topk_ids.device)
        if routing.keep_mask is not None:
            head_TKh = head_TKh.where(routing.keep_mask[..., None], -1)
        first = self.config.router.num_experts * h
        shared = torch.arange(first, self.num_heads, device=head_TKh.device).expand(T, -1)
        return torch.cat([head_TKh.view(T, -1), shared], 1).unflatten(0, (num_sequences, -1))
