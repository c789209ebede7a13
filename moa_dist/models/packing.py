"""Packs some tokens of each sequence side by side, for layers that skip the others.

Shapes: B sequences of S tokens, n places in each, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.models.cache import KeyValues
from moa_dist.models.mask import AttentionMask
from moa_dist.models.padding import runs_of
from moa_dist.models.rope import Rotation
from moa_dist.models.trace import BlockTrace, HeadSummary, HeadTrace
from moa_dist.moe.router import Routing


class Places(NamedTuple):
    """Which token is in which place; tokens keep their order."""

    token: Tensor
    """[B, n] int64: a token of the sequence, no two the same."""
    real: Tensor | None
    """[B, n] bool, false at the end of sequences with fewer tokens; None if there are none."""
    length: int
    """S."""

    @classmethod
    def of(cls, kept: Tensor, num: int, *, is_full: bool) -> Places:
        """Pack the tokens `kept` [B, S] bool into `num` places, which must suffice.

        `is_full` says that every sequence fills them.
        """
        index = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :num]
        return cls(index, None if is_full else kept.gather(1, index), kept.shape[1])

    def take(self, x: Tensor) -> Tensor:
        """Pack x [B, S] or [B, S, D]."""
        if x.dim() == 2:
            return x.gather(1, self.token)
        return x.gather(1, self.token[..., None].expand(-1, -1, x.shape[2]))

    def add(self, x: Tensor, packed: Tensor) -> Tensor:
        """Add `packed` [B, n, D] to x [B, S, D] where its tokens are."""
        return x.scatter_add(1, self.token[..., None].expand_as(packed), packed)

    def within(self, outer: Places | None) -> Places:
        """Name by their places in the sequence the tokens that were packed from `outer`."""
        if outer is None:
            return self
        return Places(outer.token.gather(1, self.token), self.real, outer.length)

    def mask(
        self, mask: AttentionMask, past: KeyValues | None, x: Tensor, d_head: int
    ) -> AttentionMask:
        """Return what packed tokens x [B, n, D] see of each other, given the `mask` of all tokens.

        `past` is the cache's entry of the layer's application: keys, values, and which places hold
        tokens; None without a cache.
        """
        rotation = mask.rotation and Rotation(*map(self._turned, mask.rotation))
        packed = AttentionMask(mask.causal, self.real, self.real, 0, rotation)
        if past is None:
            return packed._replace(runs=runs_of(x, self.real, d_head, causal=mask.causal))
        num_past = past[0].shape[2] if past else 0
        keys = torch.cat([past[2], self.held()], dim=1) if past else self.held()
        return packed._replace(key_mask=keys, num_past=num_past)

    def held(self) -> Tensor:
        """Return `real` [B, n], or as much if there is none."""
        return torch.ones_like(self.token, dtype=torch.bool) if self.real is None else self.real

    def spread(self, trace: BlockTrace) -> BlockTrace:
        """Spread a trace of packed tokens over whole sequences; other tokens chose nothing."""
        routing = {name: self._spread_routing(value) for name, value in trace.routing.items()}
        heads = {name: self._spread_heads(value) for name, value in trace.heads.items()}
        running = torch.zeros(
            len(self.token), self.length, dtype=torch.bool, device=self.token.device
        )
        return BlockTrace(routing, heads, running.scatter(1, self.token, self.held()))

    def _turned(self, table: Tensor) -> Tensor:
        """[B or 1, 1, S, W] -> [B, 1, n, W]."""
        index = self.token[:, None, :, None].expand(-1, -1, -1, table.shape[3])
        return table.expand(len(index), -1, -1, -1).gather(2, index)

    def _spread_routing(self, routing: Routing) -> Routing:
        ids = routing.topk_ids
        assigned = torch.ones_like(ids, dtype=torch.bool)
        if routing.assigned is not None:
            assigned = routing.assigned
        assigned = assigned & self.held().flatten()[:, None, None]
        return routing._replace(
            topk_ids=self._spread(ids),
            topk_weights=self._spread(routing.topk_weights),
            keep_mask=None if routing.keep_mask is None else self._spread(routing.keep_mask),
            assigned=self._spread(assigned),
            head_weights=None,
            by_head=None,
            state=None,
        )

    def _spread(self, rows: Tensor) -> Tensor:
        """[B * n, G, K] -> [B * S, G, K], zero for tokens that are not packed."""
        B = len(self.token)
        first = torch.arange(B, device=rows.device)[:, None] * self.length
        where = (self.token + first).flatten()
        return rows.new_zeros(B * self.length, *rows.shape[1:]).index_copy(0, where, rows)

    def _spread_heads(self, heads: HeadTrace) -> HeadTrace:
        (B, n), H, length = self.token.shape, heads.summary.distance.shape[1], self.length
        ids = heads.head_ids
        if ids is None:
            ids = torch.arange(H, device=self.token.device).expand(B, n, -1)
        ids = ids.masked_fill(~self.held()[..., None], -1)
        index = self.token[:, None].expand(-1, H, -1)
        summary = (part.new_zeros(B, H, length).scatter(2, index, part) for part in heads.summary)
        nowhere = ids.new_full((B, length, ids.shape[-1]), -1)
        spread = nowhere.scatter(1, self.token[..., None].expand_as(ids), ids)
        return HeadTrace(HeadSummary(*summary), spread)
