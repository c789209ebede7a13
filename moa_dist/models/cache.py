"""Keys and values of tokens that a model has read, so that it need not read them again.

A cache is a value: a forward takes one and returns a longer one; modules store nothing.

Shapes: B sequences, P tokens read so far, T new ones, h key heads, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KeyValues = tuple[Tensor, ...]
"""Rotated keys, then values [B, h, P, d] of one application of an attention layer; empty before
the first token. In a decoder that translates, those of self-attention come first, then those of
attention to the source. Of tokens that choose how often they recur, those that do are packed, in
P places; then which places hold tokens, [B, P] bool, comes third."""


def extended(past: KeyValues, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Append k and v [B, h, T, d] to `past`; returns two tensors [B, h, P + T, d]."""
    if not past:
        return k, v
    past_k, past_v = past
    if not k.shape[2]:
        return past_k, past_v
    return torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)


class Cache(NamedTuple):
    """Everything that a language model keeps about the tokens it has read."""

    layers: tuple[KeyValues, ...]
    """One entry per application of a layer, in order: a layer applied R times has R entries, since
    each application has its own input."""
    length: int = 0
    """Number of tokens read so far, padding included (P)."""
    token_mask: Tensor | None = None
    """[B, P] bool, false at padding; None without padding."""
    source_mask: Tensor | None = None
    """[B, R] bool, false at padding of the source; None without padding or without a source."""

    def select(self, rows: Tensor) -> Cache:
        """Select the sequences at `rows` [n] int64, in that order; repetitions are allowed."""
        layers = tuple(tuple(part[rows] for part in layer) for layer in self.layers)
        token_mask, source_mask = (
            None if x is None else x[rows] for x in (self.token_mask, self.source_mask)
        )
        return Cache(layers, self.length, token_mask, source_mask)

    def mask_with(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """Extend `token_mask` by new `tokens` [B, T]; returns [B, P + T], None if all are real.

        The argument `token_mask` [B, T] is None if all new tokens are real.
        """
        if self.token_mask is None and token_mask is None:
            return None
        past, new = self.token_mask, token_mask
        if past is None:
            past = torch.ones(len(tokens), self.length, dtype=torch.bool, device=tokens.device)
        if new is None:
            new = torch.ones_like(tokens, dtype=torch.bool)
        return torch.cat([past, new], dim=1)
