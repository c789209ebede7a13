"""Routers with logits that a test chooses, and routings that no router made."""

from typing import Any

import torch
from torch import Tensor

from moa_dist.config.routers import RouterConfig
from moa_dist.moe.initialize import initialize
from moa_dist.moe.router import Router, Routing
from moa_dist.moe.statistics import RoutingStatistics


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def router_config(num_experts: int, top_k: int, **more: Any) -> RouterConfig:
    return RouterConfig.model_validate(
        {"num_experts": num_experts, "top_k": top_k, "score": "softmax", **more}
    )


def random_router(
    num_experts: int, top_k: int, d_model: int, num_groups: int = 1, **more: Any
) -> Router:
    router = Router(router_config(num_experts, top_k, **more), d_model, num_groups=num_groups)
    initialize(router, seed=0)
    return router.double()


def identity_router(num_experts: int, top_k: int, num_groups: int = 1, **more: Any) -> Router:
    """Its logits are its input: [B, S, groups * experts]."""
    width = num_groups * num_experts
    router = random_router(num_experts, top_k, width, num_groups, **more)
    with torch.no_grad():
        router.logits.weight.copy_(torch.eye(width))
    return router


def statistics_of(
    logits: Tensor, token_mask: Tensor | None = None, top_k: int = 1, **more: Any
) -> RoutingStatistics:
    """What a router with `logits` [B, S, E] reports."""
    router = identity_router(logits.shape[-1], top_k, **more)
    return router(logits, token_mask).statistics


def random_routing(
    num_tokens: int,
    num_groups: int,
    num_experts: int,
    top_k: int,
    *,
    drop: float = 0,
    seed: int = 0,
) -> Routing:
    """Distinct experts per token and group; each assignment dropped with probability `drop`.

    Without statistics, which dispatchers do not read.
    """
    generator = torch.Generator().manual_seed(seed)
    T, G = num_tokens, num_groups
    ids = torch.rand(T, G, num_experts, generator=generator).topk(top_k).indices
    weights = torch.rand(T, G, top_k, generator=generator, dtype=torch.float64)
    kept = torch.rand(T, G, top_k, generator=generator) >= drop
    offset = torch.arange(G)[:, None] * num_experts
    return Routing(ids + offset, weights.requires_grad_(), kept if drop else None, statistics=None)
