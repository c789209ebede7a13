"""Which keys a query may see, in each application of a layer.

Shapes: B sequences, T queries, S keys and values, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.config.positions import WindowConfig
from moa_dist.models.documents import Documents
from moa_dist.models.padding import Runs
from moa_dist.models.rope import Rotation


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
    window: int | None = None
    """Least distance in tokens that a query does not see; None if there is none. Padding does not
    count, nor may it interrupt a document. It needs queries and keys of one text."""

    @property
    def new_key_mask(self) -> Tensor | None:
        """The part of `key_mask` for keys that do not come from a cache."""
        return None if self.key_mask is None else self.key_mask[:, self.num_past :]

    @property
    def is_by_index(self) -> bool:
        """Whether the distance of two tokens is that of their indices: no padding lies between."""
        return self.key_mask is None or self.documents is not None

    def visible(self, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """Return a bool mask, broadcastable to [B, H, T, S], of the keys that each query sees.

        Query t, if it belongs to the text of the keys, is token `num_past + t` of it.
        """
        num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
        rows = num_queries if self.causal else 1
        visible = torch.ones(rows, num_keys, dtype=torch.bool, device=device)
        if self.causal:
            visible = visible.tril(self.num_past + queries.start - keys.start)
        if self.key_mask is not None:
            visible = visible & self.key_mask[:, None, None, keys]
        if self.documents is not None:
            visible = visible & (self._difference(self.documents.ids, queries, keys) == 0)
        if self.window is not None:
            place = torch.arange(max(self.num_past + queries.stop, keys.stop), device=device)[None]
            if self.key_mask is not None and not self.is_by_index:
                place = self.key_mask.cumsum(1)
            visible = visible & (self._difference(place, queries, keys).abs() < self.window)
        # A query that sees no key (it can only be padding) would be 0 / 0: let it see all.
        return visible | ~visible.any(-1, keepdim=True)

    def _difference(self, of_tokens: Tensor, queries: slice, keys: slice) -> Tensor:
        """Subtract values [B, tokens] of keys from those of queries: [B, 1, T, S]."""
        of_queries = of_tokens[:, self.num_past + queries.start : self.num_past + queries.stop]
        return of_queries[:, None, :, None] - of_tokens[:, None, None, keys]


class LayerMasks(NamedTuple):
    """The mask of each application of a layer in a stack."""

    full: AttentionMask
    """For those that see all."""
    local: AttentionMask
    """For those with a window; the same if none has one."""
    window: WindowConfig | None = None
    """Which are which."""

    def of(self, application: int) -> AttentionMask:
        """Return the mask of an application, the first of which is 0."""
        is_full = self.window is None or self.window.size_in(application) is None
        return self.full if is_full else self.local
