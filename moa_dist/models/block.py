"""One Transformer layer: attention and feed-forward part, with the norm where asked.

Shapes: B sequences of S tokens, D model width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from moa_dist.config.model import (
    AttentionConfig,
    DenseAttentionConfig,
    DenseFFNConfig,
    FFNConfig,
    MoAConfig,
    ModelConfig,
    MoEFFNConfig,
    SwitchHeadConfig,
)
from moa_dist.distributed.arriving import Arriving
from moa_dist.models.attention import AttentionMask, AttentionOutput, DenseAttention
from moa_dist.models.cache import KeyValues
from moa_dist.models.feed_forward import DenseFeedForward, FeedForwardOutput, MoEFeedForward
from moa_dist.models.moa import MoAttention
from moa_dist.models.switchhead import SwitchHeadAttention
from moa_dist.models.trace import BlockTrace
from moa_dist.moe.routed import NOTHING_GATHERED, Gathered, RoutedModule
from moa_dist.moe.router import Router
from moa_dist.moe.statistics import RoutingStatistics

NORMS: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {
    "layernorm": nn.LayerNorm,
    "rmsnorm": nn.RMSNorm,
}
"""By the name in the configuration."""


def make_norm(config: ModelConfig, eps: float) -> nn.LayerNorm | nn.RMSNorm:
    """A norm over the model's width."""
    # Torch's RMSNorm would else take the precision of its input's type: 0.008 for bfloat16.
    return NORMS[config.norm](config.d_model, eps=eps)


def make_attention(
    config: AttentionConfig, d_model: int, init_scale: float
) -> DenseAttention | MoAttention | SwitchHeadAttention:
    """The attention kinds: a new one is a file and a line here."""
    match config:
        case DenseAttentionConfig():
            return DenseAttention(config, d_model, init_scale)
        case MoAConfig():
            return MoAttention(config, d_model, init_scale)
        case SwitchHeadConfig():
            return SwitchHeadAttention(config, d_model, init_scale)


def make_feed_forward(
    config: FFNConfig, d_model: int, init_scale: float
) -> DenseFeedForward | MoEFeedForward:
    """The feed-forward kinds: a new one is a file and a line here."""
    match config:
        case DenseFFNConfig():
            return DenseFeedForward(config, d_model, init_scale)
        case MoEFFNConfig():
            return MoEFeedForward(config, d_model, init_scale)


class GatheredExperts(NamedTuple):
    """Expert weights that travelled to this rank, for one layer; see `RoutedModule`."""

    attention: Gathered = NOTHING_GATHERED
    """Of the attention's experts."""
    ffn: Gathered = NOTHING_GATHERED
    """Of the FFN's experts."""


class ArrivingExperts(NamedTuple):
    """The same on their way."""

    attention: Mapping[str, Arriving]
    """Of the attention's experts."""
    ffn: Mapping[str, Arriving]
    """Of the FFN's experts."""

    def wait(self) -> GatheredExperts:
        """What arrived."""
        return GatheredExperts(*({name: w.wait() for name, w in part.items()} for part in self))


_ALL_EXPERTS_HERE = GatheredExperts()


class BlockOutput(NamedTuple):
    """Result of one layer."""

    x: Tensor
    """[B, S, D]."""
    statistics: dict[str, RoutingStatistics]
    """By router: `attention.query`, `attention.value`, `attention.output`, `ffn`."""
    cache: KeyValues | None = None
    """With the new keys and values; None if the layer was given none."""
    trace: BlockTrace | None = None
    """None if it was not asked for."""


class Block(nn.Module):
    """Self-attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.placement = config.norm_placement
        init_scale = math.sqrt(2 / config.num_layers)
        self.attention_norm = make_norm(config, config.norm_eps)
        self.attention = make_attention(config.attention, config.d_model, init_scale)
        # A dense FFN under peri-norm reads the raw residual and has no router to normalise for.
        unused = config.norm_placement == "peri" and isinstance(config.ffn, DenseFFNConfig)
        self.ffn_norm = nn.Identity() if unused else make_norm(config, config.norm_eps)
        self.ffn = make_feed_forward(config.ffn, config.d_model, init_scale)

    def routers(self) -> dict[str, Router]:
        """By the names under which their statistics are returned."""
        routers = {f"attention.{name}": r for name, r in self.attention.routers().items()}
        if isinstance(self.ffn, MoEFeedForward):
            routers["ffn"] = self.ffn.router
        return routers

    def macs(self, length: int) -> dict[str, int]:
        """Multiply-accumulates of one application to a sequence of `length`, by part."""
        return dict(Counter(self.attention.macs(length)) + Counter(self.ffn.macs(length)))

    def gather_experts(self) -> ArrivingExperts:
        """Weights that travel between ranks: once per forward, for all repeats of this layer."""
        attention, ffn = (
            part.gather_experts() if isinstance(part, RoutedModule) else {}
            for part in (self.attention, self.ffn)
        )
        return ArrivingExperts(attention, ffn)

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask,
        gathered: GatheredExperts = _ALL_EXPERTS_HERE,
        cache: KeyValues | None = None,
        trace: bool = False,
    ) -> BlockOutput:
        """x [B, S, D] -> x [B, S, D]."""
        match self.placement:
            case "pre":
                n = self.attention_norm(x)
                attention = self.attention(n, n, n, mask, gathered.attention, cache, trace)
                x = x + attention.y
                n = self.ffn_norm(x)
                ffn = self.ffn(n, n, mask.query_real, gathered.ffn, trace)
                x = x + ffn.y
            case "post":
                attention = self.attention(x, x, x, mask, gathered.attention, cache, trace)
                x = self.attention_norm(x + attention.y)
                ffn = self.ffn(x, x, mask.query_real, gathered.ffn, trace)
                x = self.ffn_norm(x + ffn.y)
            case "peri":  # MoEUT section 2.3: norms feed a softmax or a sigmoid, nothing else
                n = self.attention_norm(x)
                attention = self.attention(n, n, x, mask, gathered.attention, cache, trace)
                x = x + attention.y
                ffn = self.ffn(x, self.ffn_norm(x), mask.query_real, gathered.ffn, trace)
                x = x + ffn.y
        named = {f"attention.{name}": value for name, value in attention.statistics.items()}
        if ffn.statistics is not None:
            named["ffn"] = ffn.statistics
        return BlockOutput(x, named, attention.cache, _trace(attention, ffn))


def _trace(attention: AttentionOutput, ffn: FeedForwardOutput) -> BlockTrace | None:
    if attention.trace is None:
        return None
    routing = {f"attention.{name}": value for name, value in attention.trace.routing.items()}
    if ffn.routing is not None:
        routing["ffn"] = ffn.routing
    return BlockTrace(routing, attention.trace.heads)
