"""Stick-breaking attention: each key takes its share of what nearer keys have left.

ModuleFormer (Shen et al. 2023, arXiv 2306.04640, section 3.2); equations as in its released code,
where a query's own key takes part. It knows the order of keys without any position code.

Shapes: B sequences, T queries, S keys, H heads of queries, h heads of keys, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_dist.models.block_attention import recomputed_by_blocks
from moa_dist.models.mask import AttentionMask
from moa_dist.models.soft_cap import capped_scores


def log_stick_shares(scores: Tensor, visible: Tensor) -> Tensor:
    """Return the logarithms of `s_j * prod over j < m <= i of (1 - s_m)`, s = sigmoid(scores).

    `scores` [..., T, S] and `visible`, a bool mask that broadcasts to it: a key that is not visible
    takes nothing, and leaves everything to those before it. Shares of a query sum to less than 1.
    """
    taken = F.logsigmoid(scores).masked_fill(~visible, -math.inf)
    left = F.logsigmoid(-scores).masked_fill(~visible, 0.0)
    # What the keys between each one and the query leave, summed from the nearest: as differences
    # of one running sum, small values would cancel.
    behind = F.pad(left.flip(-1)[..., :-1].cumsum(-1), (1, 0)).flip(-1)
    return taken + behind


def stick_breaking_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, soft_cap: float | None = None
) -> Tensor:
    """Sum v [B, h, S, d] by the stick-breaking shares of q [B, H, T, d] and k [B, h, S, d].

    Each head of keys serves equally many consecutive heads of queries; a `soft_cap` bounds scores.
    Returns [B, H, T, d]. Shares are in memory for a block of queries only, as the backward pass
    computes them again.
    """
    assert mask.causal

    def attend(q: Tensor, k: Tensor, v: Tensor, _: int, visible: Tensor) -> Tensor:
        """q [B, h, H / h, t, d], k and v [B, h, 1, s, d] -> [B, h, H / h, t, d]."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        visible = visible[:, :, None] if visible.dim() == 4 else visible
        scores = capped_scores((q @ k.mT).to(dtype) / math.sqrt(q.shape[-1]), soft_cap)
        return log_stick_shares(scores, visible).exp().to(v.dtype) @ v

    q, k, v = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
    return recomputed_by_blocks(attend, (q,), k, v, mask).flatten(1, 2)
