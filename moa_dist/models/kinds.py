"""The kinds of attention and feed-forward part: what a layer can be made of.

A new kind is three things: a section in `config/attention.py` or `config/feed_forward.py` (its
sizes, its routers, how it shrinks), a module that is an `Attention` or a `FeedForward`, and a line
here. Sharding, counting, planning, verification, analysis, export and generation ask the section
and the module, so nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moa_dist.config.attention import (
    AttentionConfig,
    DenseAttentionConfig,
    MoAConfig,
    SwitchHeadConfig,
)
from moa_dist.config.family import (
    ComposedAttentionConfig,
    MoHConfig,
    MonetConfig,
    ResidualMoEConfig,
)
from moa_dist.config.feed_forward import DenseFFNConfig, FFNConfig, MoEFFNConfig
from moa_dist.models.attention import Attention, DenseAttention
from moa_dist.models.composed_attention import ComposedAttention
from moa_dist.models.feed_forward import DenseFeedForward, FeedForward, MoEFeedForward
from moa_dist.models.moa import MoAAttention
from moa_dist.models.moh import MoHAttention
from moa_dist.models.monet import Monet
from moa_dist.models.residual_moe import ResidualMoE
from moa_dist.models.switchhead import SwitchHeadAttention

ATTENTION: dict[type[AttentionConfig], Callable[[Any, int, float], Attention]] = {
    ComposedAttentionConfig: ComposedAttention,
    DenseAttentionConfig: DenseAttention,
    MoAConfig: MoAAttention,
    MoHConfig: MoHAttention,
    SwitchHeadConfig: SwitchHeadAttention,
}
"""Attention module by section."""

FEED_FORWARD: dict[type[FFNConfig], Callable[[Any, int, float], FeedForward]] = {
    DenseFFNConfig: DenseFeedForward,
    MoEFFNConfig: MoEFeedForward,
    MonetConfig: Monet,
    ResidualMoEConfig: ResidualMoE,
}
"""Feed-forward module by section."""


def make_attention(config: AttentionConfig, d_model: int, init_scale: float) -> Attention:
    """Build the attention that `config` describes; `init_scale` scales its initial weights."""
    return ATTENTION[type(config)](config, d_model, init_scale)


def make_feed_forward(config: FFNConfig, d_model: int, init_scale: float) -> FeedForward:
    """Build the feed-forward part that `config` describes."""
    return FEED_FORWARD[type(config)](config, d_model, init_scale)
