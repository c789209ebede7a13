"""Documents packed into sequences: which tokens belong together, and attention within each.

Shapes: B sequences of S tokens, N documents in all sequences together, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from moa_dist.kernels.hardware import Hardware

_FLASH_CAPABILITY = (8, 0)
_FLASH_WIDTH = 256
"""Widest head of flash attention."""
_FLASH_MULTIPLE = 8
"""It takes heads of a multiple of this width."""


class Documents(NamedTuple):
    """The documents of some sequences, each a run of consecutive tokens of one sequence.

    Padding forms runs of its own, so that no token of a document sees it.
    """

    ids: Tensor
    """[B, S] int64: equal for the tokens of one document, and different for any two of a
    sequence."""
    starts: Tensor
    """[N + 1] int32: the first token of each document, counted over all sequences end to end; then
    B * S."""
    lengths: tuple[int, ...]
    """Tokens of each document. The host knows them, since it would wait if a GPU held them."""

    @classmethod
    def of(cls, tokens: Tensor, end: int, token_mask: Tensor | None = None) -> Documents:
        """Find the documents of `tokens` [B, S] on the host: each ends with the token `end`.

        A sequence may begin and end within a document. `token_mask` [B, S] bool is false at
        padding, which must not interrupt a document; None without padding.
        """
        begins = tokens[:, :-1] == end
        if token_mask is not None:
            begins |= token_mask[:, 1:] != token_mask[:, :-1]
        return cls.from_ids(F.pad(begins, (1, 0)).cumsum(1))

    @classmethod
    def from_ids(cls, ids: Tensor) -> Documents:
        """Find the documents with these `ids`, which are on the host."""
        (starts,) = first_of_document(ids).flatten().nonzero(as_tuple=True)
        bounds = F.pad(starts, (0, 1), value=ids.numel())
        return cls(ids, bounds.int(), tuple(bounds.diff().tolist()))

    def moved(self, move: Callable[[Tensor], Tensor]) -> Documents:
        """Apply `move`, which copies a tensor to another device."""
        return Documents(move(self.ids), move(self.starts), self.lengths)

    def of_first(self, num_tokens: int) -> Documents:
        """Keep the `ids` of the first tokens of each sequence, which is all that a mask needs."""
        return self._replace(ids=self.ids[:, :num_tokens])

    def rows(self, index: Tensor | slice) -> Documents:
        """Select some of the sequences; on the host only."""
        return Documents.from_ids(self.ids[index])


def first_of_document(ids: Tensor) -> Tensor:
    """Return a bool mask [B, S] of the first token of each document, given `Documents.ids`."""
    return F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, causal: bool
) -> Tensor:
    """softmax(q k^T / sqrt d) v within each document; no mask is ever in memory.

    Takes q [B, H, S, d] and k, v [B, h, S, d], where each of h heads serves equally many
    consecutive heads of q; returns [B, H, S, d]. Flash attention computes all documents of a GPU at
    once, if their type and width suit it. Otherwise there is a call per document.
    """
    B, H, S, d = q.shape
    if flash_takes(q):
        starts, longest = documents.starts, max(documents.lengths)
        return flash(q, k, v, (starts, starts), (longest, longest), causal=causal)
    q, k, v = (x.transpose(1, 2).reshape(B * S, x.shape[1], d) for x in (q, k, v))
    return _one_by_one(q, k, v, documents, causal).view(B, S, H, d).transpose(1, 2)


def flash_fits(hardware: Hardware, dtype: torch.dtype, d_head: int) -> bool:
    """Whether flash attention can compute heads of this type and width."""
    return (
        hardware.device_type == "cuda"
        and hardware.capability is not None
        and hardware.capability >= _FLASH_CAPABILITY
        and dtype in (torch.bfloat16, torch.float16)
        and d_head <= _FLASH_WIDTH
    )


def flash_takes(q: Tensor) -> bool:
    """Whether flash attention can compute heads like q [B, H, T, d] where they are."""
    return flash_fits(Hardware.of(q.device), q.dtype, q.shape[-1])


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    causal: bool,
    window: int | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt d) v within each run of tokens, by flash attention.

    Takes q [B, H, T, d] and k, v [B, h, S, d]; returns [B, H, T, d]. `starts` are where the N runs
    of queries and those of keys begin, [N + 1] int32 each, counted over all sequences end to end;
    `longest` are upper bounds of their lengths. Queries of a run see the keys of the same run, with
    a `window` only those that are fewer tokens away.
    """
    B, H, T, d = q.shape
    far = -1 if window is None else window - 1
    q, k, v = (
        F.pad(x.transpose(1, 2).reshape(-1, x.shape[1], d), (0, -d % _FLASH_MULTIPLE))
        for x in (q, k, v)
    )
    heads = varlen_attn(
        q,
        k,
        v,
        *starts,
        *longest,
        scale=d**-0.5,  # of the width before it was padded
        window_size=(far, 0 if causal else far),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    assert isinstance(heads, Tensor)
    return heads[..., :d].view(B, T, H, d).transpose(1, 2)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, documents: Documents, causal: bool) -> Tensor:
    """q [B * S, H, d], k and v [B * S, h, d] -> [B * S, H, d]."""
    shared = k.shape[1] != q.shape[1]
    # Splitting, unlike slicing, collects all gradients in one tensor in the backward pass.
    parts = (x.transpose(0, 1)[None].split(documents.lengths, dim=2) for x in (q, k, v))
    heads = [
        F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(heads, dim=2)[0].transpose(0, 1).contiguous()
