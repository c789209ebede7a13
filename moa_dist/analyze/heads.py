"""Where attention heads look, added up batch by batch.

Shapes: B sequences, S tokens, H heads, M measures (the fields of `HeadSummary`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_dist.models.trace import HeadSummary
from moa_dist.moe.router import Routing

NUM_MEASURES = len(HeadSummary._fields)


class HeadSums:
    """Sums over the queries of every head of an attention, in one application of its layer.

    A head of MoA belongs to an expert, and its queries are those of the tokens that chose it:
    head `expert * heads_per_expert + i`.
    """

    def __init__(self, num_heads: int, device: torch.device) -> None:
        self.sums_HM = torch.zeros(num_heads, NUM_MEASURES, dtype=torch.float64, device=device)
        self.queries_H = torch.zeros(num_heads, dtype=torch.int64, device=device)
        """Queries that the sums run over."""

    def add(self, heads: HeadSummary, experts: Routing | None, counted: Tensor) -> None:
        """Count a batch; `experts` are those of MoA's queries.

        `counted` [B, S] bool leaves out padding and the first tokens. Queries that an expert's
        capacity dropped are zero, look nowhere, and do not count.
        """
        values_BSHM = torch.stack(heads, dim=-1).transpose(1, 2)
        B, S, slots, _ = values_BSHM.shape
        head = torch.arange(slots, device=counted.device).expand(B, S, -1)
        counted = counted[..., None].expand(B, S, slots)
        if experts is not None:
            ids_BSK = experts.topk_ids.view(B, S, -1)
            heads_per_expert = slots // ids_BSK.shape[2]
            inner = torch.arange(heads_per_expert, device=counted.device)
            head = (ids_BSK[..., None] * heads_per_expert + inner).flatten(2)
            if experts.keep_mask is not None:
                keep_BSK = experts.keep_mask.view(ids_BSK.shape)
                counted = counted & keep_BSK.repeat_interleave(heads_per_expert, -1)
        head = head[counted]
        self.sums_HM.index_add_(0, head, values_BSHM[counted].double())
        self.queries_H += head.bincount(minlength=len(self.queries_H))

    def means(self) -> Tensor:
        """[H, M] in fp64; zero for heads without a query."""
        return self.sums_HM / self.queries_H.clamp(min=1)[:, None]
