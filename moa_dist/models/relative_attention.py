"""Attention with learned vectors for relative positions (Shaw et al. 2018).

Shapes: B sequences, T queries, S keys, H heads of queries, h heads of keys, d head width, C largest
distance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moa_dist.kernels.gradient_sum import alias
from moa_dist.models.block_attention import recomputed_by_blocks
from moa_dist.models.mask import AttentionMask
from moa_dist.models.soft_cap import capped_scores
from moa_dist.moe.initialize import Initializer, Normal


class RelativePositions(nn.Module):
    """A vector per head of keys and distance, which is added to keys at that distance."""

    def __init__(self, num_heads: int, d_head: int, largest: int) -> None:
        super().__init__()
        self.largest = largest
        self.vectors = nn.Parameter(torch.empty(num_heads, d_head, 2 * largest + 1))

    def initializers(self) -> dict[str, Initializer]:
        """Initial distribution of each parameter; as small as queries in a product with them."""
        return {"vectors": Normal(1 / math.sqrt(self.vectors.shape[1]))}

    def macs(self, num_queries: int) -> int:
        """Count multiply-accumulates for one query of each head of keys, so many times."""
        return num_queries * self.vectors.numel()

    def forward(self, q: Tensor) -> Tensor:
        """q [B, H, T, d] -> products with the vectors of all distances [B, H, T, 2 C + 1].

        Consecutive heads of queries share those of keys, as in `softmax_attention`.
        """
        vectors = alias(self.vectors).to(q.dtype)
        return (q.unflatten(1, (len(vectors), -1)) @ vectors[:, None]).flatten(1, 2)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    soft_cap: float | None = None,
    *,
    by_distance: Tensor,
) -> Tensor:
    """Compute what `softmax_attention` does, with `by_distance` added to q k^T.

    `by_distance` [B, H, T, 2 C + 1] are the products that `RelativePositions` returns for q. The
    attention of one block of queries is in memory at a time; the backward pass computes it again.
    """

    def attend(
        q: Tensor, by_distance: Tensor, k: Tensor, v: Tensor, first: int, visible: Tensor
    ) -> Tensor:
        """q [B, H, t, d], k and v [B, h, s, d] -> [B, H, t, d]."""
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = (q @ k.mT).to(dtype) + distance_bias(by_distance, first, k.shape[2])
        scores = capped_scores(scores / math.sqrt(q.shape[-1]), soft_cap)
        return scores.masked_fill(~visible, -math.inf).softmax(-1).to(v.dtype) @ v

    return recomputed_by_blocks(attend, (q, by_distance), k, v, mask)


def distance_bias(by_distance: Tensor, first: int, num_keys: int) -> Tensor:
    """Select what is added to each score: [..., T, 2 C + 1] -> [..., T, S = num_keys].

    Query t is token `first + t`. The middle column is that of the query's own token; keys that
    follow it have those after.
    """
    largest, device = by_distance.shape[-1] // 2, by_distance.device
    query = first + torch.arange(by_distance.shape[-2], device=device)
    distance = torch.arange(num_keys, device=device) - query[:, None]
    columns = distance.clamp(-largest, largest) + largest
    return by_distance.gather(-1, columns.expand(*by_distance.shape[:-2], -1, -1))
