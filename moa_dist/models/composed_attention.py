"""DCMHA: heads composed anew for each pair of tokens (Xiao et al. 2024, arXiv 2405.08553).

The vector of all heads' attention from a query to a key is multiplied by a matrix that depends on
both tokens, before the softmax and again after it. The matrix is the identity plus, for each of
the two tokens, a part of rank 2 and a diagonal.

Shapes: B sequences, T queries, S keys, N heads, d head width, R = 2 rank.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_dist.config.family import ComposedAttentionConfig
from moa_dist.kernels.gradient_sum import alias
from moa_dist.models.attention import Context, DenseAttention, Mixed
from moa_dist.models.block_attention import recomputed_by_blocks
from moa_dist.models.linear import Linear
from moa_dist.models.mask import AttentionMask
from moa_dist.moe.initialize import Initializer, Normal

_RANK = 2
_PACKED = 2 * _RANK + 1
"""Numbers of a composition per token and head."""
_NORM_EPS = 1e-6
_SMALL = 0.01
"""Initial size of what is added to the identity."""


class Composition(NamedTuple):
    """What the tokens of one side, queries or keys, do to the heads at one place."""

    gather: Tensor
    """[B, N, T, R], contracts the heads."""
    spread: Tensor
    """[B, N, T, R], spreads the result over the heads."""
    diagonal: Tensor
    """[B, N, T, 1], scales each head."""

    @classmethod
    def of(cls, packed: Tensor) -> Composition:
        """Unpack [B, N, T, 2 R + 1]."""
        return cls(*packed.split([_RANK, _RANK, 1], dim=-1))


class CompositionWeights(nn.Module):
    """Maps tokens to compositions: of queries and of keys, before and after the softmax."""

    def __init__(self, d_model: int, d_hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.hidden = Linear(d_model, 4 * d_hidden, Normal(1 / math.sqrt(d_model)))
        self.gather = nn.Parameter(torch.empty(4, d_hidden, _RANK * num_heads))
        self.spread = nn.Parameter(torch.empty(4, d_hidden, _RANK * num_heads))
        self.diagonal = Linear(d_model, 4 * num_heads, Normal(_SMALL / math.sqrt(d_model)))

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of its own parameters; what gathers heads is normalized anyway."""
        std = 1 / math.sqrt(self.gather.shape[1])
        return {"gather": Normal(std), "spread": Normal(_SMALL * std)}

    def macs(self, num_tokens: int) -> int:
        """Count multiply-accumulates for so many tokens."""
        return (
            self.hidden.macs(num_tokens)
            + self.diagonal.macs(num_tokens)
            + (num_tokens * (self.gather.numel() + self.spread.numel()))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [4, B, N, T, 2 R + 1], packed for `Composition.of`."""
        hidden = F.gelu(self.hidden(x)).unflatten(-1, (4, -1))
        gather, spread = (
            torch.einsum("btck,cko->cbto", hidden, weight).unflatten(-1, (_RANK, self.num_heads))
            for weight in map(alias, (self.gather, self.spread))
        )  # [4, B, T, R, N]
        gather = F.rms_norm(gather, (self.num_heads,), eps=_NORM_EPS)
        diagonal = self.diagonal(x).tanh().unflatten(-1, (4, 1, self.num_heads))
        parts = torch.cat([gather, spread, diagonal.permute(2, 0, 1, 3, 4)], dim=3)
        return parts.permute(0, 1, 4, 2, 3)


def composed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    soft_cap: float | None = None,
    *,
    of_queries: Tensor,
) -> Tensor:
    """Attend with composed heads; returns [B, N, T, d].

    q [B, N, T, d] and `of_queries` [B, N, T, 2 (2 R + 1)], their compositions before and after the
    softmax; k [B, N, S, d + 2 (2 R + 1)], each key followed by its own; v [B, N, S, d]. Attention
    is in memory for a block of queries only. Logits have no `soft_cap`.
    """
    assert soft_cap is None
    return recomputed_by_blocks(_attend, (q, of_queries), k, v, mask)


def _attend(q: Tensor, of_queries: Tensor, k: Tensor, v: Tensor, _: int, visible: Tensor) -> Tensor:
    d = q.shape[-1]
    k, *of_keys = k.split([d, _PACKED, _PACKED], dim=-1)
    before, after = zip(of_queries.split(_PACKED, dim=-1), of_keys, strict=True)
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = _composed((q @ k.mT).to(dtype) / math.sqrt(d), *before)
    # Masked after composing, which mixes heads but not keys, and would turn -inf into NaN.
    scores = scores.masked_fill(~visible, -math.inf)
    return _composed(scores.softmax(-1), *after).to(v.dtype) @ v


def _composed(attention: Tensor, of_queries: Tensor, of_keys: Tensor) -> Tensor:
    """Compose attention [B, N, T, S], by [B, N, T, 2 R + 1] and [B, N, S, 2 R + 1]."""
    by_query = Composition.of(of_queries.to(attention.dtype))
    by_key = Composition.of(of_keys.to(attention.dtype))
    low_query = torch.einsum("bnts,bntr->brts", attention, by_query.gather)
    low_key = torch.einsum("bnts,bnsr->brts", attention, by_key.gather)
    scale = 1 + by_query.diagonal + by_key.diagonal.transpose(-1, -2)
    return (
        attention * scale
        + torch.einsum("brts,bntr->bnts", low_query, by_query.spread)
        + torch.einsum("brts,bnsr->bnts", low_key, by_key.spread)
    )


class ComposedAttention(DenseAttention):
    """Multi-head attention whose heads are composed by the query's and the key's token."""

    config: ComposedAttentionConfig

    def __init__(self, config: ComposedAttentionConfig, d_model: int, init_scale: float) -> None:
        super().__init__(config, d_model, init_scale)
        d_hidden = config.d_compose or 4 * config.num_heads
        self.compose = CompositionWeights(d_model, d_hidden, config.num_heads)

    def macs(self, length: int, num_keys: int | None = None, *, training: bool) -> dict[str, int]:
        """Add the compositions to those of dense attention."""
        parts = super().macs(length, num_keys, training=training)
        # Both sides gather and spread at R ranks, and scale, twice for each pair of tokens.
        pairs = length * (num_keys or length) * self.num_heads * 2 * (2 * 2 * _RANK + 1)
        return parts | {
            "projections": parts["projections"] + self.compose.macs(length),
            "softmax": parts["softmax"] + pairs,
        }

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Mixed:
        """Implement `Attention.mix`; a cached key carries its compositions behind it."""
        q = self.rotated(self.q_norm, self.split(self.q(query)), context)
        k = self.rotated(self.k_norm, self.split(self.k(key)), context)
        v = self.split(self.v(value))
        of_queries = self.compose(query)
        of_keys = of_queries if key is query else self.compose(key)
        k = torch.cat([k, *of_keys[1::2]], dim=-1)
        product = partial(composed_attention, of_queries=torch.cat([*of_queries[0::2]], dim=-1))
        heads = self.attend(q, k, v, context, product)
        y = self.o(heads.merged())
        return Mixed(y, heads._replace(k=heads.k[..., : self.config.d_head]), {})
