"""Keys and values of tokens that a model has read, so that it need not read them again.

A cache is a value: a forward takes one and returns a longer one, and modules keep nothing.

Shapes: B sequences, P tokens read so far, T new ones, h key heads, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KeyValues = tuple[Tensor, ...]
"""Keys, rotated, and values [B, h, P, d] of one application of one attention layer; nothing
before the first token. Of a decoder's layer those of its self-attention, then those of its
attention to the source."""


def extended(past: KeyValues, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`past`, then k and v [B, h, T, d]: two tensors [B, h, P + T, d]."""
    if not past:
        return k, v
    past_k, past_v = past
    if not k.shape[2]:
        return past_k, past_v
    return torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)


class Cache(NamedTuple):
    """What a language model keeps of the tokens that it has read."""

    layers: tuple[KeyValues, ...]
    """By application of a layer, in order: a layer applied R times has R of them, for each sees
    another input."""
    length: int = 0
    """Tokens read so far, padding included (P)."""
    token_mask: Tensor | None = None
    """[B, P] bool, false at padding; None when there is none."""
    source_mask: Tensor | None = None
    """[B, R] bool, false at padding of the source text; None when there is none, or no source."""

    def select(self, rows: Tensor) -> Cache:
        """The sequences at `rows` [n] int64, in that order; one may be taken several times."""
        layers = tuple(tuple(part[rows] for part in layer) for layer in self.layers)
        token_mask, source_mask = (
            None if x is None else x[rows] for x in (self.token_mask, self.source_mask)
        )
        return Cache(layers, self.length, token_mask, source_mask)

    def mask_with(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """[B, P + T]: which tokens are real once `tokens` [B, T] are read, too.

        `token_mask` [B, T] tells of these, None for all; returns None when there is no padding.
        """
        if self.token_mask is None and token_mask is None:
            return None
        past, new = self.token_mask, token_mask
        if past is None:
            past = torch.ones(len(tokens), self.length, dtype=torch.bool, device=tokens.device)
        if new is None:
            new = torch.ones_like(tokens, dtype=torch.bool)
        return torch.cat([past, new], dim=1)
