"""A kind of attention, of feed-forward part and of router that the package has never heard of.

Each is what the recipe in `moa_dist/README.md` asks for: a section, a module, and a line in a list.
Importing this file defines them; `tests/kinds/test_new_kinds.py` takes them out again.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import PositiveInt, SerializeAsAny
from torch import Tensor, nn

from moa_dist.config.attention import AttentionConfig
from moa_dist.config.feed_forward import FFNConfig
from moa_dist.config.routers import RouterConfig, shrunk
from moa_dist.errors import Problem
from moa_dist.models.attention import Attention, Context, Mixed
from moa_dist.models.feed_forward import FeedForward, FFNContext
from moa_dist.models.kinds import ATTENTION, FEED_FORWARD
from moa_dist.models.linear import Linear
from moa_dist.models.softmax import softmax_macs
from moa_dist.moe.experts import GroupedLinear
from moa_dist.moe.initialize import Initializer, Normal
from moa_dist.moe.routed_module import RoutedModule, RoutedProjection
from moa_dist.moe.router import Router, Routing
from moa_dist.moe.router_kinds import ROUTERS, make_router
from moa_dist.moe.router_logits import RouterLogits


class TanhRouterConfig(RouterConfig):
    """Logits through a hidden layer."""

    kind: Literal["toy_tanh"] = "toy_tanh"
    """Names this kind."""
    d_hidden: PositiveInt
    """Hidden width."""


class TanhLogits(nn.Module):
    """`W_2 tanh(W_1 x)` in fp32 or wider."""

    def __init__(self, d_model: int, d_hidden: int, num_outputs: int, init: Initializer) -> None:
        super().__init__()
        self.hidden = RouterLogits(d_model, d_hidden, init)
        self.out = RouterLogits(d_hidden, num_outputs, Normal(1 / math.sqrt(d_hidden)))

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.out(self.hidden(x_TD).tanh())


class TanhRouter(Router):
    """The top K of logits that have a hidden layer."""

    config: TanhRouterConfig

    def _make_logits(self, d_model: int, init: Initializer) -> TanhLogits:
        return TanhLogits(d_model, self.config.d_hidden, self.num_experts, init)

    def macs(self, num_tokens: int) -> int:
        return num_tokens * sum(weight.numel() for weight in self.logits.parameters())


class RoutedHeadsConfig(AttentionConfig):
    """All heads attend, and each token takes the results of some of them."""

    kind: Literal["toy_heads"] = "toy_heads"
    """Names this kind."""
    router: SerializeAsAny[RouterConfig]
    """Chooses heads; there are as many heads as experts."""

    def problems(self, path: str) -> Iterator[Problem]:
        if self.router.top_k == self.router.num_experts:
            keys = (f"{path}.router.top_k", f"{path}.router.num_experts")
            yield Problem(f"`{path}` takes all heads; use dense attention", keys)


class RoutedHeads(RoutedModule, Attention):
    """Dense queries, keys and values; the output projection of a head is an expert."""

    def __init__(self, config: RoutedHeadsConfig, d_model: int, init_scale: float) -> None:
        super().__init__()
        self.config = config
        H, d = config.router.num_experts, config.d_head
        init = Normal(init_scale / math.sqrt(d_model))
        self.qkv = Linear(d_model, 3 * H * d, init)
        self.router = make_router(config.router, d_model, init=init)
        self.o = GroupedLinear(H, d, d_model, Normal(init_scale / math.sqrt(H * d)))

    @property
    def num_heads(self) -> int:
        return self.config.router.num_experts

    def routers(self) -> dict[str, Router]:
        return {"query": self.router}

    def macs(self, length: int, num_keys: int | None = None, *, training: bool) -> dict[str, int]:
        width = self.num_heads * self.config.d_head
        return {
            "projections": self.qkv.macs(length),
            "experts": length * self.config.router.top_k * self.o.macs_per_row(),
            "routers": self.router.macs(length),
            "softmax": softmax_macs(length, num_keys or length, width),
        }

    def routed_projections(self) -> list[RoutedProjection]:
        widths = self.o.d_in, self.o.d_out
        return [
            RoutedProjection("router", ("o",), "slot", widths[0], "token", widths[1], weighted=True)
        ]

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Mixed:
        B, T, D = query.shape
        weights = self.qkv.weight.chunk(3)
        q, k, v = (
            self.split(nn.functional.linear(x, w))
            for x, w in zip((query, key, value), weights, strict=True)
        )
        q, k = (self.rotated(nn.Identity(), x, context) for x in (q, k))
        heads = self.attend(q, k, v, context)
        heads_TH = heads.values.transpose(1, 2).flatten(0, 1)
        routing = self.router(query, context.mask.query_mask, state=context.state.of("query"))
        slots = heads_TH[torch.arange(B * T)[:, None], routing.topk_ids.flatten(1)].flatten(0, 1)
        plan = self.dispatcher.plan(routing, self.router.num_experts)
        experts = self.expert_weights("o", gathered=context.gathered)
        sent = plan.dispatch(slots, "slot")
        y = plan.run_and_combine(experts, sent, "slot", "token", weighted=True).wait()
        return Mixed(y.view(B, T, D), heads, {"query": routing})


class LinearExpertsConfig(FFNConfig):
    """A dense part, and experts that are one matrix each."""

    kind: Literal["toy_linear"] = "toy_linear"
    """Names this kind."""
    d_ff: PositiveInt
    """Hidden width of the dense part."""
    router: SerializeAsAny[RouterConfig]
    """Chooses the experts of each token."""

    def shrink(self, expert_parallel: int) -> "LinearExpertsConfig":
        return super().shrink(expert_parallel).changed(d_ff=shrunk(self.d_ff, 16))


class LinearExperts(RoutedModule, FeedForward):
    """`W_down relu(W_up x) + sum over chosen e of w_e W_e x`."""

    def __init__(self, config: LinearExpertsConfig, d_model: int, init_scale: float) -> None:
        super().__init__()
        init = Normal(init_scale / math.sqrt(d_model))
        self.top_k = config.router.top_k
        self.up = Linear(d_model, config.d_ff, init)
        self.down = Linear(config.d_ff, d_model, Normal(init_scale / math.sqrt(config.d_ff)))
        self.router = make_router(config.router, d_model, init=init)
        self.experts = GroupedLinear(config.router.num_experts, d_model, d_model, init)

    def routers(self) -> dict[str, Router]:
        return {"": self.router}

    def macs(self, length: int, *, training: bool) -> dict[str, int]:
        return {
            "projections": self.up.macs(length) + self.down.macs(length),
            "experts": length * self.top_k * self.experts.macs_per_row(),
            "routers": self.router.macs(length),
        }

    def routed_projections(self) -> list[RoutedProjection]:
        D = self.experts.d_in
        return [RoutedProjection("router", ("experts",), "token", D, "token", D, weighted=True)]

    def transform(
        self, x: Tensor, router_input: Tensor, context: FFNContext
    ) -> tuple[Tensor, dict[str, Routing]]:
        routing = self.router(router_input, context.token_mask, state=context.state.of(""))
        plan = self.dispatcher.plan(routing, self.router.num_experts)
        experts = self.expert_weights("experts", gathered=context.gathered)
        sent = plan.dispatch(x.flatten(0, 1), "token")
        dense = self.down(self.up(x).relu())
        y = plan.run_and_combine(experts, sent, "token", "token", weighted=True).wait()
        return dense + y.view_as(x), {"": routing}


ROUTERS[TanhRouterConfig] = TanhRouter
ATTENTION[RoutedHeadsConfig] = RoutedHeads
FEED_FORWARD[LinearExpertsConfig] = LinearExperts
