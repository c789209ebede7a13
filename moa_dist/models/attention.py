"""What an attention kind is, and what all share; dense attention.

A kind says how it projects tokens to queries, keys and values, and results to outputs; what lies
between is the same in all.

Shapes: B sequences, T queries, S keys and values, H heads, d head width, D model width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from moa_dist.config.attention import AttentionConfig, DenseAttentionConfig
from moa_dist.config.parts import Part
from moa_dist.models.cache import KeyValues, extended
from moa_dist.models.linear import Linear
from moa_dist.models.mask import AttentionMask
from moa_dist.models.norms import RMSNorm
from moa_dist.models.rope import apply_rope
from moa_dist.models.softmax import softmax_attention, softmax_macs, visible_keys
from moa_dist.models.trace import (
    AttentionTrace,
    HeadTrace,
    LogShares,
    head_summary,
    log_softmax_shares,
)
from moa_dist.moe.initialize import Normal
from moa_dist.moe.routed_module import NOTHING_GATHERED, Gathered, recurrent_states
from moa_dist.moe.router import Router, Routing
from moa_dist.moe.statistics import RoutingStatistics
from moa_dist.moe.token_state import NO_STATE, TokenState
from moa_dist.profiling import annotated

_HEAD_NORM_EPS = 1e-6
"""Added to the mean square of a head's queries or keys, as in Qwen3."""


class AttentionOutput(NamedTuple):
    """Result of an attention layer."""

    y: Tensor
    """[B, T, D]."""
    statistics: dict[str, RoutingStatistics]
    """By the name of the router within the layer; empty for dense attention."""
    cache: KeyValues | None = None
    """The cache extended by the new keys and values; None if the layer was given none."""
    trace: AttentionTrace | None = None
    """What the layer decided; None unless a trace was requested."""
    states: dict[str, Tensor] = {}  # noqa: RUF012  # never changed
    """States of recurrent routers for the next layer, by the name of the router."""


class Context(NamedTuple):
    """What a layer is applied with, other than tokens."""

    mask: AttentionMask
    """Which keys queries see, and where tokens are."""
    gathered: Gathered
    """Weights of all experts where they were gathered."""
    cache: KeyValues | None
    """Keys and values of the tokens before; None if none are kept."""
    state: TokenState = NO_STATE
    """What routers know of tokens; weights are those of query tokens."""


class Heads(NamedTuple):
    """Heads after attention, and what they attended with."""

    values: Tensor
    """[B, H, T, d], values summed by attention. Autocast may have narrowed them."""
    q: Tensor
    """[B, H, T, d], rotated."""
    k: Tensor
    """[B, h, S, d], rotated, those of the cache first."""
    cache: KeyValues | None
    """As in `AttentionOutput`."""

    def merged(self) -> Tensor:
        """Return the values of all heads of a token side by side: [B, T, H d]."""
        return self.values.transpose(1, 2).flatten(2)


class Mixed(NamedTuple):
    """What a kind of attention makes of tokens."""

    y: Tensor
    """[B, T, D]."""
    heads: Heads
    """All that were computed."""
    routing: dict[str, Routing]
    """By the names of `Attention.routers`."""


Product = Callable[[Tensor, Tensor, Tensor, AttentionMask, float | None], Tensor]
"""Sums values by attention, as `softmax_attention` does."""


class Attention(nn.Module, ABC):
    """A kind of attention, built from its section, the model's width and a scale of its weights.

    One with experts is a `RoutedModule` too.
    """

    part: ClassVar[Part] = "attention"
    config: AttentionConfig
    key_routers: ClassVar[frozenset[str]] = frozenset()
    """Names of the routers that route the tokens of keys and values; the others route queries."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """Number of heads in the layer, of which a token may use only some."""

    def routers(self) -> dict[str, Router]:
        """All routers, by the names under which their statistics are returned."""
        return {}

    @abstractmethod
    def macs(self, length: int, num_keys: int | None = None, *, training: bool) -> dict[str, int]:
        """Multiply-accumulates for one sequence of `length` tokens, by part.

        Parts are `projections`, `experts`, `routers` and `softmax`. A query counts as seeing
        `num_keys` keys, all by default. Counted is a forward in training or, if not, in
        evaluation, where tokens may take fewer experts.
        """

    @abstractmethod
    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Mixed:
        """Compute `forward` from projections, `rotated`, `attend`, and what the kind adds."""

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
        state: TokenState = NO_STATE,
    ) -> AttentionOutput:
        """`query` [B, T, D], `key` and `value` [B, S, D] -> y [B, T, D].

        Under peri-norm `query` and `key` are normalized and `value` is the raw residual, elsewhere
        all three are the same. `gathered` holds the weights of all experts where they were
        gathered. With a `cache`, `key` and `value` belong to the tokens that follow those in it.
        At padding, y has no part of routed experts.
        """
        mixed = self.mix(query, key, value, Context(mask, gathered, cache, state))
        statistics = {name: routing.statistics for name, routing in mixed.routing.items()}
        decided = self.trace(mixed, mask) if trace else None
        states = recurrent_states(mixed.routing)
        return AttentionOutput(mixed.y, statistics, mixed.heads.cache, decided, states)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H d] -> [B, H, T, d]."""
        return x.unflatten(-1, (-1, self.config.d_head)).transpose(1, 2)

    def rotated(self, norm: nn.Module, x: Tensor, context: Context) -> Tensor:
        """Normalize queries or new keys x [B, H, T, d], and rotate them by their positions."""
        return apply_rope(norm(x), self.config.rope, context.mask.rotation)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        product: Product = softmax_attention,
    ) -> Heads:
        """Attend with rotated queries q [B, H, T, d] to the cache and to new keys k, values v."""
        cache = context.cache
        if cache is not None:
            k, v = cache = extended(cache, k, v)
        return Heads(product(q, k, v, context.mask, self.config.soft_cap), q, k, cache)

    def trace(self, mixed: Mixed, mask: AttentionMask) -> AttentionTrace:
        """Trace what the layer decided."""
        heads, soft_cap = mixed.heads, self.config.soft_cap
        return traced(mixed.routing, heads.q, heads.k, mask, soft_cap=soft_cap)


def traced(
    routing: dict[str, Routing],
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    head_ids: Tensor | None = None,
    soft_cap: float | None = None,
    log_shares: LogShares = log_softmax_shares,
    bias: Tensor | None = None,
) -> AttentionTrace:
    """Trace a layer with these routers, queries [B, H, T, d] and keys [B, h, S, d].

    Each head of the keys serves equally many consecutive ones of the queries. `head_ids` as in
    `HeadTrace`, `soft_cap` as in `softmax_attention`. `log_shares` turns products, to which
    `bias` [B, H, T, S] is added, into attention.
    """
    visible = visible_keys(q, k, mask).expand(len(q), 1, -1, -1)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    summary = head_summary(q, k, visible, mask.num_past, soft_cap, log_shares, bias)
    return AttentionTrace(routing, HeadTrace(summary, head_ids))


def head_norm(config: AttentionConfig) -> nn.Module:
    """Build the norm of a head's queries or keys [..., d], which does nothing without `qk_norm`."""
    return RMSNorm(config.d_head, eps=_HEAD_NORM_EPS) if config.qk_norm else nn.Identity()


class DenseAttention(Attention):
    """Multi-head attention without biases (Vaswani et al. 2017, section 3.2).

    Heads of queries may share heads of keys and values.
    """

    config: DenseAttentionConfig

    def __init__(self, config: DenseAttentionConfig, d_model: int, init_scale: float) -> None:
        super().__init__()
        self.config = config
        width, kv_width = config.num_heads * config.d_head, config.kv_heads * config.d_head
        to_heads = Normal(init_scale / math.sqrt(d_model))
        self.q = Linear(d_model, width, to_heads)
        self.k = Linear(d_model, kv_width, to_heads)
        self.v = Linear(d_model, kv_width, to_heads)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        self.o = Linear(width, d_model, Normal(init_scale / math.sqrt(width)))

    @property
    def num_heads(self) -> int:
        """Number of heads; every token uses all of them."""
        return self.config.num_heads

    def macs(self, length: int, num_keys: int | None = None, *, training: bool) -> dict[str, int]:
        """Implement `Attention.macs`."""
        width = self.config.num_heads * self.config.d_head
        projections = sum(p.macs(length) for p in (self.q, self.k, self.v, self.o))
        return {
            "projections": projections,
            "softmax": softmax_macs(length, num_keys or length, width),
        }

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Mixed:
        """Implement `Attention.mix`."""
        q = self.rotated(self.q_norm, self.split(self.q(query)), context)
        k = self.rotated(self.k_norm, self.split(self.k(key)), context)
        heads = self.attend(q, k, self.split(self.v(value)), context)
        return Mixed(self.o(heads.merged()), heads, {})
