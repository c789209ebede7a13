"""Attention among sequences with padding, by flash attention and without masks in memory.

Padding in front of a text, the text, and padding behind it are three runs of consecutive tokens.
Flash attention computes each run apart, wherever they begin: GPUs find that out by themselves, and
the host does not wait for it.

Shapes: B sequences, T queries, S keys, H heads, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_dist.kernels.hardware import Hardware
from moa_dist.models.documents import flash, flash_fits


class Runs(NamedTuple):
    """Where runs of queries and of keys begin, three of each in every sequence.

    Counted over all sequences end to end; queries of a run see the keys of the same run.
    """

    queries: Tensor
    """[3 B + 1] int32."""
    keys: Tensor
    """[3 B + 1] int32."""

    @classmethod
    def of(cls, key_mask: Tensor, num_queries: int, *, causal: bool) -> Runs:
        """Find the runs of `key_mask` [B, S] bool, false at padding.

        Causal queries are the tokens of the keys, and those that are padding see padding. Else
        all queries of a sequence see its real keys. On a GPU the process ends if there is padding
        between real tokens.
        """
        S = key_mask.shape[1]
        place = torch.arange(S, device=key_mask.device)
        count = key_mask.sum(1)
        first = key_mask.int().argmax(1)  # the first of equal ones
        is_text = (place >= first[:, None]) & (place < (first + count)[:, None])
        torch._assert_async((is_text == key_mask).all(), "padding lies between real tokens")
        keys = _starts(first, first + count, S)
        if causal:
            return cls(keys, keys)
        nothing = torch.zeros_like(first)
        return cls(_starts(nothing, nothing + num_queries, num_queries), keys)


def runs_of(x: Tensor, key_mask: Tensor | None, d_head: int, *, causal: bool) -> Runs | None:
    """Find what queries x [B, T, D] attend to; None without padding, or without flash attention."""
    if key_mask is None or not flash_fits(Hardware.of(x.device), x.dtype, d_head):
        return None
    return Runs.of(key_mask, x.shape[1], causal=causal)


def _starts(begin: Tensor, end: Tensor, length: int) -> Tensor:
    """Return where three runs of each sequence begin, whose second is [begin, end) [B]."""
    within = torch.stack([torch.zeros_like(begin), begin, end], 1)
    offset = torch.arange(0, len(begin) * length, length, device=begin.device)
    starts = (within + offset[:, None]).flatten()
    return F.pad(starts, (0, 1), value=len(begin) * length).int()


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: Runs, *, causal: bool, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt d) v within each run: q [B, H, T, d], k and v [B, h, S, d].

    With a `window`, queries see only keys that are fewer tokens away.
    """
    longest = q.shape[2], k.shape[2]  # at most; how long they are is known to the GPU alone
    return flash(q, k, v, (runs.queries, runs.keys), longest, causal=causal, window=window)
