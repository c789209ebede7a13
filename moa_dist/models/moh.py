"""MoH: mixture-of-head attention (Jin et al. 2024, arXiv 2410.11842, section 3.2).

All heads attend. A token takes the results of the shared heads and of K of the others, whose
output projections are experts, of one head each or of several. A second gate shares the token's
weight between both sorts. Factors follow the released code: with even choices every head has
weight 1.

If a token takes all experts, each with as many heads as a dense model, this is the soft mixture of
dense attention, with keys and values of its own for each, of BAM (Zhang et al. 2024, arXiv
2408.08274).

Shapes: B sequences, T queries, S shared heads, E experts of h routed heads, K chosen ones, d head
width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moa_dist.config.family import MoHConfig
from moa_dist.models.attention import Attention, Context, Mixed, head_norm
from moa_dist.models.linear import Bias, Linear
from moa_dist.models.softmax import softmax_macs
from moa_dist.moe.experts import GroupedLinear
from moa_dist.moe.initialize import Normal
from moa_dist.moe.routed_module import RoutedModule, RoutedProjection
from moa_dist.moe.router import Router
from moa_dist.moe.router_kinds import make_router
from moa_dist.moe.router_logits import RouterLogits


class MoHAttention(RoutedModule, Attention):
    """`y = sum over shared heads and chosen experts h of g_h W_o^h attention_h`."""

    config: MoHConfig

    def __init__(self, config: MoHConfig, d_model: int, init_scale: float) -> None:
        super().__init__()
        self.config = config
        S, E, d = config.num_shared_heads, config.router.num_experts, config.d_head
        of_expert = config.heads_per_expert * d
        width = S * d + E * of_expert
        init = Normal(init_scale / math.sqrt(d_model))
        self.q = Linear(d_model, width, init, bias=config.bias)
        self.k = Linear(d_model, width, init, bias=config.bias)
        self.v = Linear(d_model, width, init, bias=config.bias)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        self.router = make_router(config.router, d_model, init=init)
        self.stage_gate = RouterLogits(d_model, 2, init) if S else None
        self.shared_gate = RouterLogits(d_model, S, init) if S > 1 else None
        if S:
            self.router.mean_names += ("weight_of_shared_heads",)
        out = Normal(init_scale / math.sqrt(width))
        self.shared_o = Linear(S * d, d_model, out) if S else None
        self.o = GroupedLinear(E, of_expert, d_model, out)
        self.bias = Bias(d_model) if config.bias else None

    @property
    def num_heads(self) -> int:
        """Heads of both sorts, shared ones first."""
        config = self.config
        return config.num_shared_heads + config.router.num_experts * config.heads_per_expert

    def routers(self) -> dict[str, Router]:
        """The only router, which chooses experts for queries."""
        return {"query": self.router}

    def macs(self, length: int, num_keys: int | None = None, *, training: bool) -> dict[str, int]:
        """Implement `Attention.macs`."""
        dense = (self.q, self.k, self.v, self.shared_o)
        chosen = self.config.router.experts_per_token(training).mean
        gates = sum(g.weight.numel() for g in (self.stage_gate, self.shared_gate) if g)
        return {
            "projections": sum(p.macs(length) for p in dense if p),
            "experts": length * chosen * self.o.macs_per_row(),
            "routers": self.router.macs(length) + length * gates,
            "softmax": softmax_macs(
                length, num_keys or length, self.num_heads * self.config.d_head
            ),
        }

    def routed_projections(self) -> list[RoutedProjection]:
        """Implement `RoutedModule.routed_projections`."""
        width, D = self.o.d_in, self.o.d_out
        return [RoutedProjection("router", ("o",), "slot", width, "token", D, weighted=True)]

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Mixed:
        """Implement `Attention.mix`."""
        B, T, D = query.shape
        routing = self.router(query, context.mask.query_mask, state=context.state.of("query"))
        q = self.rotated(self.q_norm, self.split(self.q(query)), context)
        k = self.rotated(self.k_norm, self.split(self.k(key)), context)
        heads = self.attend(q, k, self.split(self.v(value)), context)
        results = heads.values.to(query.dtype).transpose(1, 2).flatten(0, 1)
        shared, routed = results.tensor_split([self.config.num_shared_heads], dim=1)
        of_shared, of_routed = self._stages(query.reshape(B * T, D))
        weights = routing.topk_weights * of_routed[:, :, None]
        if self.stage_gate is not None:
            share = 1 - of_routed / (2 * self.config.router.top_k)
            routing = routing.reporting(share, context.mask.query_mask)
        plan = self.dispatcher.plan(routing._replace(topk_weights=weights), self.router.num_experts)
        routed = routed.flatten(1).unflatten(1, (-1, self.o.d_in))  # [B * T, E, h d]
        chosen = routing.topk_ids.flatten(1)[:, :, None].expand(-1, -1, self.o.d_in)
        sent = plan.dispatch(routed.gather(1, chosen).flatten(0, 1), "slot")
        experts = self.expert_weights("o", gathered=context.gathered)
        returning = plan.run_and_combine(experts, sent, "slot", "token", weighted=True)
        # Computed while rows are in flight.
        dense = None
        if self.shared_o is not None:
            dense = self.shared_o((shared * of_shared[:, :, None].to(shared.dtype)).flatten(1))
        y = returning.wait() if dense is None else returning.wait() + dense
        y = y.view(B, T, D)
        if self.bias is not None:
            y = self.bias(y)
        return Mixed(y, heads, {"query": routing})

    def _stages(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B * T, D] -> weights of shared heads [B * T, S], factor of routed ones [B * T, 1]."""
        S, K = self.config.num_shared_heads, self.config.router.top_k
        if self.stage_gate is None:
            return x[:, :0], torch.full_like(x[:, :1], K)
        of_shared, of_routed = (2 * self.stage_gate(x).softmax(-1)).split(1, dim=-1)
        if self.shared_gate is not None:
            of_shared = of_shared * S * self.shared_gate(x).softmax(-1)
        return of_shared, of_routed * K
