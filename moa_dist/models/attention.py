"""Shared by all attention kinds: masks, rotary positions, the softmax product. Dense attention.

Shapes: B sequences, T queries, S keys and values, H heads, d head width, D model width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_dist.config.model import AttentionConfig, DenseAttentionConfig, Part
from moa_dist.models.cache import KeyValues, extended
from moa_dist.models.documents import Documents, document_attention
from moa_dist.models.linear import Linear
from moa_dist.models.norms import RMSNorm
from moa_dist.models.padding import Runs, padded_attention
from moa_dist.models.rope import Rotation, apply_rope
from moa_dist.models.trace import AttentionTrace, HeadTrace, head_summary
from moa_dist.moe.initialize import Normal
from moa_dist.moe.routed_module import NOTHING_GATHERED, Gathered
from moa_dist.moe.router import Router, Routing
from moa_dist.moe.statistics import RoutingStatistics
from moa_dist.profiling import annotated

_BLOCK = 128
"""Queries whose mask is in memory at a time, where documents need one."""
_HEAD_NORM_EPS = 1e-6
"""Added to the mean square of a head's queries or keys, as in Qwen3."""


class AttentionMask(NamedTuple):
    """Says which keys a query may see, which tokens are padding, and where tokens are."""

    causal: bool
    """Whether query t sees keys 0 ... num_past + t only."""
    query_mask: Tensor | None = None
    """[B, T] bool, true for real tokens; None when there is no padding."""
    key_mask: Tensor | None = None
    """[B, S] bool, true for real tokens; None when there is no padding."""
    num_past: int = 0
    """Number of leading keys that come from a cache."""
    rotation: Rotation | None = None
    """Rotation of queries and new keys by their positions; None for positions 0 ... T - 1."""
    documents: Documents | None = None
    """Documents of the keys, to the last of which queries belong: a query sees those of its own
    document only. None if it sees those of all."""
    runs: Runs | None = None
    """What `key_mask` says, for flash attention; None where that does not run."""

    @property
    def new_key_mask(self) -> Tensor | None:
        """The part of `key_mask` for keys that do not come from a cache."""
        return None if self.key_mask is None else self.key_mask[:, self.num_past :]


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


class Attention(nn.Module, ABC):
    """A kind of attention, built from its section, the model's width and a scale of its weights.

    One with experts is a `RoutedModule` too.
    """

    part: ClassVar[Part] = "attention"
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
    def macs(self, length: int) -> dict[str, int]:
        """Multiply-accumulates for one sequence of `length` tokens, by part.

        Parts are `projections`, `experts`, `routers` and `softmax`.
        """

    @abstractmethod
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
        """`query` [B, T, D], `key` and `value` [B, S, D] -> y [B, T, D].

        Under peri-norm `query` and `key` are normalized and `value` is the raw residual, elsewhere
        all three are the same. `gathered` holds the weights of all experts where they were
        gathered. With a `cache`, `key` and `value` belong to the tokens that follow those in it.
        """


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """softmax(q k^T / sqrt d) v for q [B, H, T, d] and k, v [B, H, S, d]; returns [B, H, T, d].

    With fewer heads in k and v, each of theirs serves equally many consecutive heads of q.
    Materializes a mask only where `is_causal` cannot express it, as masks rule out fused kernels.
    """
    if mask.documents is not None:
        if mask.num_past:
            return _by_blocks(q, k, v, mask)
        return document_attention(q, k, v, mask.documents, causal=mask.causal)
    if mask.runs is not None:
        return padded_attention(q, k, v, mask.runs, causal=mask.causal)
    shared = k.shape[1] != q.shape[1]
    # A single query after those of the cache sees every key.
    causal = mask.causal and not (mask.num_past and q.shape[-2] == 1)
    # `is_causal` lets query t see keys 0 ... t, whatever came before.
    if mask.key_mask is None and not (causal and mask.num_past):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)
    visible = visible_keys(q, k, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=shared)


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """Compute causal attention a block of queries at a time, as if all before it came from a cache.

    The documents tell padding from text, so there is no need of `key_mask`.
    """
    assert mask.causal
    assert mask.documents is not None
    heads, shared, num_past = [], k.shape[1] != q.shape[1], mask.num_past
    for block in q.split(_BLOCK, dim=2):
        num_keys = num_past + block.shape[2]
        seen = mask.documents._replace(ids=mask.documents.ids[:, :num_keys])
        keys, values = (x[:, :, :num_keys] for x in (k, v))
        visible = visible_keys(block, keys, AttentionMask(True, None, None, num_past, None, seen))
        heads.append(
            F.scaled_dot_product_attention(block, keys, values, visible, enable_gqa=shared)
        )
        num_past = num_keys
    return torch.cat(heads, dim=2)


def visible_keys(q: Tensor, k: Tensor, mask: AttentionMask) -> Tensor:
    """Return a bool mask, broadcastable to [B, H, T, S], of the keys that each query sees."""
    T, S = q.shape[-2], k.shape[-2]
    visible = torch.ones(T if mask.causal else 1, S, dtype=torch.bool, device=q.device)
    if mask.causal:
        visible = visible.tril(mask.num_past)
    if mask.key_mask is not None:
        visible = visible & mask.key_mask[:, None, None, :]
    if mask.documents is not None:
        ids = mask.documents.ids[:, None]
        visible = visible & (ids[..., mask.num_past :, None] == ids[..., None, :])
    # A query that sees no key (it can only be padding) would be 0 / 0: let it see all.
    return visible | ~visible.any(-1, keepdim=True)


def traced(
    routing: dict[str, Routing],
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    head_ids: Tensor | None = None,
) -> AttentionTrace:
    """Trace a layer with these routers, queries [B, H, T, d] and keys [B, h, S, d].

    Each head of the keys serves equally many consecutive ones of the queries. `head_ids` as in
    `HeadTrace`.
    """
    visible = visible_keys(q, k, mask).expand(len(q), 1, -1, -1)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return AttentionTrace(routing, HeadTrace(head_summary(q, k, visible, mask.num_past), head_ids))


def softmax_macs(num_queries: int, num_keys: int, width: int) -> int:
    """Count multiply-accumulates of both attention products over `width` dimensions.

    Every query counts as seeing all keys, also in causal models, as the papers count, and also
    those of other documents, since how long these are depends on the data.
    """
    return 2 * num_queries * num_keys * width


def head_norm(config: AttentionConfig) -> nn.Module:
    """Build the norm of a head's queries or keys [..., d], which does nothing without `qk_norm`."""
    return RMSNorm(config.d_head, eps=_HEAD_NORM_EPS) if config.qk_norm else nn.Identity()


class DenseAttention(Attention):
    """Multi-head attention without biases (Vaswani et al. 2017, section 3.2).

    Heads of queries may share heads of keys and values.
    """

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

    def macs(self, length: int) -> dict[str, int]:
        """Implement `Attention.macs`."""
        width = self.config.num_heads * self.config.d_head
        projections = sum(p.macs(length) for p in (self.q, self.k, self.v, self.o))
        return {"projections": projections, "softmax": softmax_macs(length, length, width)}

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
        """Implement `Attention.forward`; `gathered` is empty, as there are no experts."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.config.d_head)).transpose(1, 2)
            for project, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = (apply_rope(x, self.config.rope, mask.rotation) for x in (q, k))
        if cache is not None:
            k, v = cache = extended(cache, k, v)
        heads = softmax_attention(q, k, v, mask)
        y = self.o(heads.transpose(1, 2).flatten(2))
        return AttentionOutput(y, {}, cache, traced({}, q, k, mask) if trace else None)
