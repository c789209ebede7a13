"""What layers decide, returned as values for analysis when a trace is requested.

Shapes: B sequences, T queries, S keys, H heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.models.soft_cap import capped_scores
from moa_dist.moe.router import Routing


class HeadSummary(NamedTuple):
    """Summary of where each query of each head attends: [B, H, T] each, in fp32 or wider."""

    distance: Tensor
    """Mean distance in tokens to the keys, weighted by attention. The distance between tokens of
    two texts is that of their positions."""
    entropy: Tensor
    """Entropy of the attention over the keys, nats."""
    previous: Tensor
    """Attention to the preceding token; for the first token, to itself."""
    first: Tensor
    """Attention to the first token that the query sees: of the sequence, its document or window."""
    itself: Tensor
    """Attention to the query's own token."""


class HeadTrace(NamedTuple):
    """Where the heads of an attention layer attend, and which heads they are."""

    summary: HeadSummary
    """Summary of the H heads that were computed for each token."""
    head_ids: Tensor | None = None
    """[B, T, H] int64: which of the layer's heads was computed in each place, -1 for one that was
    dropped for lack of capacity; None where the h-th is always head h."""


class AttentionTrace(NamedTuple):
    """What an attention layer decided in one application."""

    routing: dict[str, Routing]
    """By the name of the router within the layer; empty for dense attention."""
    heads: HeadTrace
    """Where its heads attend."""


class BlockTrace(NamedTuple):
    """What one application of a layer decided."""

    routing: dict[str, Routing]
    """By the names under which `BlockOutput` has their statistics."""
    heads: dict[str, HeadTrace]
    """By attention: `attention`, and in a decoder that translates `attention.cross`."""
    running: Tensor | None = None
    """[B, S] bool, false for tokens that have halted or do not recur, and for padding; None where
    all tokens are computed."""


LogShares = Callable[[Tensor, Tensor], Tensor]
"""Maps products [..., T, S] and the bool mask of visible keys to logarithms of attention."""


def log_softmax_shares(scores: Tensor, visible: Tensor) -> Tensor:
    """Return the logarithms of a softmax over the visible keys; see `LogShares`."""
    return scores.masked_fill(~visible, -math.inf).log_softmax(-1)


def head_summary(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    num_past: int,
    soft_cap: float | None,
    log_shares: LogShares = log_softmax_shares,
    bias: Tensor | None = None,
) -> HeadSummary:
    """Summarize the attention by q k^T / sqrt d of q [B, H, T, d] to k [B, H, S, d].

    `visible` [B, 1, T or 1, S] bool says which keys a query sees; query t is token `num_past + t`.
    `soft_cap` as in `moa_dist.models.softmax`, `bias` [B, H, T, S] is added to q k^T.
    """
    # A sequence at a time: fused kernels never hold the probabilities, but here they are needed.
    biases = [None] * len(q) if bias is None else bias
    sequences = [
        _summary(*parts, num_past, soft_cap, log_shares)
        for parts in zip(q, k, visible, biases, strict=True)
    ]
    return HeadSummary(*(torch.stack(part) for part in zip(*sequences, strict=True)))


def _summary(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    num_past: int,
    soft_cap: float | None,
    log_shares: LogShares,
) -> HeadSummary:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores_HTS = q.to(dtype) @ k.to(dtype).transpose(-1, -2)
    scores_HTS = (scores_HTS if bias is None else scores_HTS + bias) / math.sqrt(q.shape[-1])
    log_HTS = log_shares(capped_scores(scores_HTS, soft_cap), visible)
    share_HTS = log_HTS.exp()
    key = torch.arange(k.shape[-2], device=q.device)
    query = torch.arange(q.shape[-2], device=q.device) + num_past
    distance_TS = (query[:, None] - key).abs().to(dtype)
    first_T = visible[0].byte().argmax(-1).expand(len(query))

    def at(token_T: Tensor) -> Tensor:
        index = token_T.clamp(0, len(key) - 1)[None, :, None].expand(len(q), -1, 1)
        # Queries of another text than the keys may stand beyond these, where there is no token.
        return share_HTS.gather(-1, index).squeeze(-1) * (token_T < len(key))

    return HeadSummary(
        distance=(share_HTS * distance_TS).sum(-1),
        # A share of zero has no part in the entropy, and its logarithm is infinite.
        entropy=-(share_HTS * log_HTS.masked_fill(~visible, 0)).sum(-1),
        previous=at(torch.maximum(query - 1, first_T)),
        first=at(first_T),
        itself=at(query),
    )
