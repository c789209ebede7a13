"""SwitchHead (Csordas et al. 2023, arXiv 2312.07987), as MoEUT uses it.

Queries and keys are dense. Each head has experts of its own for values, chosen by the
source token, and for outputs, chosen by the destination token.

Shapes: B sequences, T queries, S keys, H heads, E experts per head, d head width.
"""

from __future__ import annotations

import math

from torch import Tensor

from moa_dist.config.attention import SwitchHeadConfig
from moa_dist.models.attention import Attention, Context, Mixed, head_norm
from moa_dist.models.linear import Linear
from moa_dist.models.softmax import softmax_macs
from moa_dist.moe.experts import GroupedLinear
from moa_dist.moe.initialize import Normal
from moa_dist.moe.routed_module import RoutedModule, RoutedProjection
from moa_dist.moe.router import Router
from moa_dist.moe.router_kinds import make_router


class SwitchHeadAttention(RoutedModule, Attention):
    """One softmax per head between mixtures of value and of output experts (equations 7-10).

    With one expert per head, values and outputs are dense with a gate per head.
    """

    config: SwitchHeadConfig
    key_routers = frozenset({"value"})

    def __init__(self, config: SwitchHeadConfig, d_model: int, init_scale: float) -> None:
        super().__init__()
        self.config = config
        H, d = config.num_heads, config.d_head
        num_experts = H * config.router.num_experts
        from_model = Normal(init_scale / math.sqrt(d_model))
        self.q = Linear(d_model, H * d, from_model)
        self.k = Linear(d_model, H * d, from_model)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        self.value_router = make_router(config.router, d_model, num_groups=H, init=from_model)
        self.v = GroupedLinear(num_experts, d_model, d, from_model)
        self.output_router = make_router(config.router, d_model, num_groups=H, init=from_model)
        to_model = Normal(init_scale / math.sqrt(H * d))
        self.o = GroupedLinear(num_experts, d, d_model, to_model)
        is_shared = config.shared_experts
        self.shared_v = Linear(d_model, H * d, from_model) if is_shared else None
        self.shared_o = Linear(H * d, d_model, to_model) if is_shared else None

    @property
    def num_heads(self) -> int:
        """Number of heads; every token uses all of them."""
        return self.config.num_heads

    def routers(self) -> dict[str, Router]:
        """One router for the values of source tokens, one for the outputs of destination tokens."""
        return {"value": self.value_router, "output": self.output_router}

    def macs(self, length: int, num_keys: int | None = None, *, training: bool) -> dict[str, int]:
        """Implement `Attention.macs`."""
        H, K = self.config.num_heads, self.config.router.experts_per_token(training).mean
        dense = (self.q, self.k, self.shared_v, self.shared_o)
        return {
            "projections": sum(p.macs(length) for p in dense if p is not None),
            "experts": length * H * K * (self.v.macs_per_row() + self.o.macs_per_row()),
            "routers": self.value_router.macs(length) + self.output_router.macs(length),
            "softmax": softmax_macs(length, num_keys or length, H * self.config.d_head),
        }

    def routed_projections(self) -> list[RoutedProjection]:
        """Implement `RoutedModule.routed_projections`."""
        D, d = self.v.d_in, self.v.d_out
        return [
            RoutedProjection("value_router", ("v",), "token", D, "group", d, weighted=True),
            RoutedProjection("output_router", ("o",), "group", d, "token", D, weighted=True),
        ]

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Mixed:
        """Implement `Attention.mix`.

        The value router reads `key` and the output router `query`, which are normalized under
        peri-norm, while value experts read the raw residual in `value`.
        """
        (B, T, D), S, H = query.shape, key.shape[1], self.config.num_heads
        mask, state = context.mask, context.state
        of_keys = state._replace(weight=None).of("value")
        value_routing = self.value_router(key, mask.new_key_mask, state=of_keys)
        plan = self.dispatcher.plan(value_routing, self.value_router.num_experts)
        # Queries and keys are computed while rows are in flight.
        sent = plan.dispatch(value.reshape(B * S, D), "token")
        q = self.rotated(self.q_norm, self.split(self.q(query)), context)
        experts = self.expert_weights("v", gathered=context.gathered)
        returning = plan.run_and_combine(experts, sent, "token", "group", weighted=True)
        k = self.rotated(self.k_norm, self.split(self.k(key)), context)
        v = returning.wait().view(B, S, H * self.config.d_head)
        if self.shared_v is not None:
            v = v + self.shared_v(value)
        heads = self.attend(q, k, self.split(v), context)

        results = heads.merged().to(query.dtype)  # autocast narrows it
        output_routing = self.output_router(query, mask.query_mask, state=state.of("output"))
        plan = self.dispatcher.plan(output_routing, self.output_router.num_experts)
        experts = self.expert_weights("o", gathered=context.gathered)
        sent = plan.dispatch(results.view(B * T * H, -1), "group")
        returning = plan.run_and_combine(experts, sent, "group", "token", weighted=True)
        y = returning.wait().view(B, T, D)
        if self.shared_o is not None:
            y = y + self.shared_o(results)
        return Mixed(y, heads, {"value": value_routing, "output": output_routing})
