"""The product of attention, softmax(q k^T / sqrt d) v, by the fastest kernel that sees as needed.

Shapes: B sequences, T queries, S keys and values, H heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_dist.models.block_attention import attention_by_blocks
from moa_dist.models.documents import Documents, document_attention, flash, flash_takes
from moa_dist.models.mask import AttentionMask
from moa_dist.models.padding import padded_attention


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, soft_cap: float | None = None
) -> Tensor:
    """softmax(cap(q k^T / sqrt d)) v for q [B, H, T, d] and k, v [B, H, S, d]: [B, H, T, d].

    With fewer heads in k and v, each of theirs serves equally many consecutive heads of q. With a
    `soft_cap` c, cap(x) is c tanh(x / c). Whatever queries see, no mask and no logits of all pairs
    of tokens are in memory, but for those of padding.
    """
    if mask.window is not None and mask.window >= k.shape[2]:
        mask = mask._replace(window=None)  # which hides nothing
    if soft_cap is not None or (mask.documents is not None and mask.num_past):
        return attention_by_blocks(q, k, v, mask, soft_cap)
    # Runs of queries that see both ways hold padding, runs of keys do not: their indices differ.
    if mask.runs is not None and (mask.causal or mask.window is None):
        return padded_attention(q, k, v, mask.runs, causal=mask.causal, window=mask.window)
    if mask.window is not None:
        if mask.num_past or not mask.is_by_index or not flash_takes(q):
            return attention_by_blocks(q, k, v, mask)
        starts, longest = _runs(q, mask.documents)
        return flash(
            q, k, v, (starts, starts), (longest, longest), causal=mask.causal, window=mask.window
        )
    if mask.documents is not None:
        return document_attention(q, k, v, mask.documents, causal=mask.causal)
    shared = k.shape[1] != q.shape[1]
    # A single query after those of the cache sees every key.
    causal = mask.causal and not (mask.num_past and q.shape[-2] == 1)
    # `is_causal` lets query t see keys 0 ... t, whatever came before. Masks rule out some kernels.
    if mask.key_mask is None and not (causal and mask.num_past):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)
    visible = visible_keys(q, k, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=shared)


def _runs(q: Tensor, documents: Documents | None) -> tuple[Tensor, int]:
    """Return where documents start, or sequences if there are none, and the longest of them."""
    if documents is not None:
        return documents.starts, max(documents.lengths)
    B, S = len(q), q.shape[2]
    return torch.arange(0, B * S + 1, S, dtype=torch.int32, device=q.device), S


def visible_keys(q: Tensor, k: Tensor, mask: AttentionMask) -> Tensor:
    """Return a bool mask, broadcastable to [B, H, T, S], of the keys that each query sees."""
    return mask.visible(slice(0, q.shape[-2]), slice(0, k.shape[-2]), q.device)


def softmax_macs(num_queries: int, num_keys: int, width: int) -> int:
    """Count multiply-accumulates of both attention products over `width` dimensions.

    Every query counts as seeing all keys, or as many as a window has, also in causal models, as the
    papers count, and also those of other documents, since how long these are depends on the data.
    """
    return 2 * num_queries * num_keys * width
