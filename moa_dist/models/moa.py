"""MoA: mixture of attention heads (Zhang et al. 2022, arXiv 2210.05144, section 3).

An expert is a query projection and an output projection. Each query token routes to K experts; keys
and values are shared by all. Ranks exchange only what goes into and comes out of projections: the
softmax runs where the token's sequence is.

Shapes: B sequences, T queries, S keys, K chosen experts, h heads per expert, d head width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.config.attention import MoAConfig
from moa_dist.models.attention import Attention, Context, Mixed, Product, head_norm, traced
from moa_dist.models.linear import Bias, Linear
from moa_dist.models.mask import AttentionMask
from moa_dist.models.relative_attention import (
    RelativePositions,
    distance_bias,
    relative_attention,
)
from moa_dist.models.shared_heads import SharedHeads
from moa_dist.models.softmax import softmax_attention, softmax_macs
from moa_dist.models.stick_breaking import log_stick_shares, stick_breaking_attention
from moa_dist.models.trace import AttentionTrace, LogShares, log_softmax_shares
from moa_dist.moe.dispatch import DispatchPlan
from moa_dist.moe.experts import GroupedLinear
from moa_dist.moe.initialize import Normal, XavierUniform
from moa_dist.moe.routed_module import Gathered, RoutedModule, RoutedProjection
from moa_dist.moe.router import Router, Routing
from moa_dist.moe.router_kinds import make_router


class Attend(NamedTuple):
    """A way from queries and keys to a sum of values."""

    product: Product
    """Sums values."""
    log_shares: LogShares
    """Computes the shares of keys that `product` sums values by, as logarithms, for traces."""


ATTEND: dict[str, Attend] = {
    "softmax": Attend(softmax_attention, log_softmax_shares),
    "stick_breaking": Attend(stick_breaking_attention, log_stick_shares),
}
"""Ways by `MoAConfig.attend`."""


class MoAAttention(RoutedModule, Attention):
    """`y_t = sum over chosen e of w_e W_o^e attention(W_q^e x_t, K, V)` (equations 5-8).

    The two round trips, for queries and for outputs, share one dispatch plan.
    """

    config: MoAConfig

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
        largest, h = config.relative_positions, config.heads_per_expert
        self.positions = RelativePositions(h, config.d_head, largest) if largest else None
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

    def macs(self, length: int, num_keys: int | None = None, *, training: bool) -> dict[str, int]:
        """Implement `Attention.macs`; places that hold no expert attend like others."""
        chosen, places = self.config.router.experts_per_token(training)
        attending = places + self.config.shared_experts
        width = self.config.heads_per_expert * self.config.d_head
        dense = [self.k, self.v, *(() if self.shared is None else (self.shared,))]
        softmax = softmax_macs(length, num_keys or length, attending * width)
        if self.positions is not None:
            softmax += self.positions.macs(length * attending)
        return {
            "projections": sum(projection.macs(length) for projection in dense),
            "experts": length * chosen * (self.q.macs_per_row() + self.o.macs_per_row()),
            "routers": self.router.macs(length),
            "softmax": softmax,
        }

    def routed_projections(self) -> list[RoutedProjection]:
        """Implement `RoutedModule.routed_projections`."""
        D, width = self.q.d_in, self.q.d_out
        return [
            RoutedProjection("router", ("q",), "token", D, "slot", width, weighted=False),
            RoutedProjection("router", ("o",), "slot", width, "token", D, weighted=True),
        ]

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Mixed:
        """Implement `Attention.mix`."""
        routing = self.router(query, context.mask.query_mask, state=context.state.of("query"))
        plan = self.dispatcher.plan(routing, self.router.num_experts)
        q, k, v = self._project(query, key, value, plan, context)
        product = ATTEND[self.config.attend].product
        if self.positions is not None:
            product = partial(relative_attention, by_distance=self.positions(q))
        heads = self.attend(q, k, v, context, product)
        values = heads.values.to(query.dtype)  # autocast narrows it
        y = self._sum_outputs(values, plan, context.gathered)
        return Mixed(y, heads, {"query": routing})

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, plan: DispatchPlan, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute W_q^e x of the experts e used by each token, [B, h * used, T, d], and K and V.

        Keys and values are computed while rows are in flight.
        """
        B, T, _ = query.shape
        h = self.config.heads_per_expert
        sent = plan.dispatch(query.flatten(0, 1), "token")
        k = self.rotated(self.k_norm, self.split(self.k(key)), context)
        experts = self.expert_weights("q", gathered=context.gathered)
        returning = plan.run_and_combine(experts, sent, "token", "slot", weighted=False)
        v = self.split(self.v(value))
        shared = None if self.shared is None else self.shared.queries(query, h)
        q = returning.wait().view(B, T, -1, h, self.config.d_head)
        if shared is not None:
            q = torch.cat([q, shared.to(q.dtype)], 2)
        # The heads of one place in an expert share its keys and values, whatever the slot: they
        # are brought together.
        q = q.permute(0, 3, 2, 1, 4).flatten(1, 2)
        return self.rotated(self.q_norm, q, context), k, v

    def _sum_outputs(self, values: Tensor, plan: DispatchPlan, gathered: Gathered) -> Tensor:
        """Map values [B, h * used, T, d] by W_o^e, and sum them by the weights of the experts."""
        B, _, T, d = values.shape
        h = self.config.heads_per_expert
        values = values.unflatten(1, (h, -1)).permute(0, 3, 2, 1, 4)  # [B, T, used, h, d]
        num_routed = values.shape[2] - self.config.shared_experts
        sent = plan.dispatch(values[:, :, :num_routed].reshape(-1, h * d), "slot")
        experts = self.expert_weights("o", gathered=gathered)
        of_shared = None if self.shared is None else self.shared.outputs(values[:, :, num_routed:])
        y = plan.run_and_combine(experts, sent, "slot", "token", weighted=True).wait()
        y = y.view(B, T, -1)
        if of_shared is not None:
            y = y + of_shared
        return y if self.bias is None else self.bias(y)

    def trace(self, mixed: Mixed, mask: AttentionMask) -> AttentionTrace:
        """Trace heads in slot-major order, as `_head_ids` has them."""
        h, (q, k) = self.config.heads_per_expert, (mixed.heads.q, mixed.heads.k)
        k = k.repeat(1, q.shape[1] // h, 1, 1)
        bias = None
        if self.positions is not None:
            bias = _slot_major(distance_bias(self.positions(q), mask.num_past, k.shape[2]), h)
        q = _slot_major(q, h)
        ids, soft_cap = self._head_ids(mixed.routing["query"], len(q)), self.config.soft_cap
        shares = ATTEND[self.config.attend].log_shares
        return traced(mixed.routing, q, k, mask, ids, soft_cap, shares, bias)

    def _head_ids(self, routing: Routing, num_sequences: int) -> Tensor:
        """Return `HeadTrace.head_ids`: the heads of the expert in each slot, then shared ones."""
        h, T = self.config.heads_per_expert, len(routing.topk_ids)
        head_TKh = routing.topk_ids[..., None] * h + torch.arange(h, device=routing.topk_ids.device)
        if routing.keep_mask is not None:
            head_TKh = head_TKh.where(routing.keep_mask[..., None], -1)
        first = self.config.router.num_experts * h
        shared = torch.arange(first, self.num_heads, device=head_TKh.device).expand(T, -1)
        return torch.cat([head_TKh.view(T, -1), shared], 1).unflatten(0, (num_sequences, -1))


def _slot_major(x: Tensor, heads_per_expert: int) -> Tensor:
    """[B, h * used, ...] -> [B, used * h, ...]."""
    return x.unflatten(1, (heads_per_expert, -1)).transpose(1, 2).flatten(1, 2)
