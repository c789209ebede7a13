"""Accumulates, batch by batch, where attention heads look.

Shapes: B sequences, S tokens, H heads, M measures (the fields of `HeadSummary`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_dist.models.trace import HeadSummary, HeadTrace

NUM_MEASURES = len(HeadSummary._fields)


class HeadSums:
    """Sums measures over the queries of every head of an attention, in one call of its layer.

    If a token uses only some of the heads, as in MoA, each head counts the tokens that use it.
    """

    def __init__(self, num_heads: int, device: torch.device) -> None:
        self.sums_HM = torch.zeros(num_heads, NUM_MEASURES, dtype=torch.float64, device=device)
        self.queries_H = torch.zeros(num_heads, dtype=torch.int64, device=device)
        """Number of queries in the sums."""

    def add(self, heads: HeadTrace, counted: Tensor) -> None:
        """Add a batch.

        `counted` [B, S] bool excludes padding and the first tokens. Queries that were dropped for
        lack of capacity are zero and look nowhere, so they do not count.
        """
        values_BSHM = torch.stack(heads.summary, dim=-1).transpose(1, 2)
        B, S, H, _ = values_BSHM.shape
        head = heads.head_ids
        if head is None:
            head = torch.arange(H, device=counted.device).expand(B, S, -1)
        counted = counted[..., None] & (head >= 0)
        head = head[counted]
        self.sums_HM.index_add_(0, head, values_BSHM[counted].double())
        self.queries_H += head.bincount(minlength=len(self.queries_H))

    def means(self) -> Tensor:
        """Return the means [H, M] in fp64; zero for heads without a query."""
        return self.sums_HM / self.queries_H.clamp(min=1)[:, None]
