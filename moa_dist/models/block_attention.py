"""Attention a block of queries at a time, where no fused kernel sees as its queries do.

It is for windows where flash attention does not run, for caches of documents, and for soft caps. A
block reads only the keys that it may see, and its logits are computed again in the backward pass:
what is kept are queries, keys, values and the result, as by flash attention. Kinds of attention
without a softmax, or with more in it, say what a block computes (`recomputed_by_blocks`).

Shapes: B sequences, T queries, S keys and values, H heads of queries in h groups, each of which
shares a head of keys, d head width; t queries in a block, r = H / h * t rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moa_dist.models.mask import AttentionMask

_BLOCK = 128
"""Most queries of a block."""


class _Softmax(NamedTuple):
    """The softmax of a block."""

    share: Tensor
    """[B, h, r, keys] attention to each key, in fp32 or wider."""
    slope: Tensor | None
    """Of the same shape: the derivative of capped logits; None without a cap."""


def attention_by_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, soft_cap: float | None = None
) -> Tensor:
    """Compute what `moa_dist.models.softmax.softmax_attention` does, for any mask and cap."""
    device = q.device.type
    # Else the backward pass, which autocast does not cover, would meet other types.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    heads: Tensor = _ByBlocks.apply(q, k, v, mask, soft_cap)
    return heads


class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, soft_cap: float | None
    ) -> Tensor:
        ctx.mask, ctx.soft_cap = mask, soft_cap
        heads = torch.empty_like(q)
        for queries, keys in _blocks(mask, q.shape[2], k.shape[2]):
            rows = _rows(q, queries, k.shape[1])
            visible = mask.visible(queries, keys, q.device)
            share, _ = _softmax(rows, k[:, :, keys], _length(queries), visible, soft_cap)
            heads[:, :, queries] = _heads(share.to(v.dtype) @ v[:, :, keys], q.shape[1])
        ctx.save_for_backward(q, k, v, heads)
        return heads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, heads = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        wide = torch.promote_types(k.dtype, torch.float32)
        grad_k, grad_v = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        scale = q.shape[-1] ** -0.5
        for queries, keys in _blocks(ctx.mask, q.shape[2], k.shape[2]):
            rows, of_rows, grad = (_rows(x, queries, k.shape[1]) for x in (q, heads, grads[0]))
            visible = ctx.mask.visible(queries, keys, q.device)
            share, slope = _softmax(rows, k[:, :, keys], _length(queries), visible, ctx.soft_cap)
            grad_v[:, :, keys] += share.to(v.dtype).mT @ grad
            # Its mean over the softmax follows from what came out, as in flash attention.
            mean = (grad.to(wide) * of_rows).sum(-1, keepdim=True)
            of_logits = share * ((grad @ v[:, :, keys].mT).to(wide) - mean)
            if slope is not None:
                of_logits = of_logits * slope
            of_logits = (of_logits * scale).to(q.dtype)
            grad_q[:, :, queries] = _heads(of_logits @ k[:, :, keys], q.shape[1])
            grad_k[:, :, keys] += of_logits.mT @ rows
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _blocks(mask: AttentionMask, num_queries: int, num_keys: int) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block, and the keys that any of them may see."""
    window = mask.window if mask.is_by_index else None
    for start in range(0, num_queries, _BLOCK):
        stop = min(start + _BLOCK, num_queries)
        first, last = 0, num_keys
        if mask.causal:
            last = mask.num_past + stop
        elif window is not None:
            last = min(mask.num_past + stop + window - 1, num_keys)
        if window is not None:
            first = max(mask.num_past + start - window + 1, 0)
        yield slice(start, stop), slice(first, last)


def recomputed_by_blocks(
    attend: Callable[..., Tensor],
    rows: tuple[Tensor, ...],
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
) -> Tensor:
    """Attend with a block of queries at a time, whose attention the backward pass computes again.

    `rows` [..., T, width] have a row for each query, and k and v [..., S, width] for each key.
    `attend` returns [..., t, d] for those of a block, k and v up to its end, the index of its first
    query among the keys, and what its queries see, as `AttentionMask.visible` returns it. What it
    keeps must be among its arguments. Returns [..., T, d].
    """
    parts = zip(*(x.split(_BLOCK, dim=-2) for x in rows), strict=True)
    slices = _blocks(mask._replace(window=None), rows[0].shape[-2], k.shape[-2])
    heads = []
    for block, (queries, keys) in zip(parts, slices, strict=True):
        visible = mask.visible(queries, keys, k.device)
        operands = *block, k[..., keys, :], v[..., keys, :], mask.num_past + queries.start, visible
        heads.append(checkpoint(attend, *operands, use_reentrant=False))
    return torch.cat(heads, dim=-2)


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length


def _rows(x: Tensor, queries: slice, num_key_heads: int) -> Tensor:
    """[B, H, T, d] -> [B, h, r, d]: the rows of a block that meet the same keys."""
    return x[:, :, queries].unflatten(1, (num_key_heads, -1)).flatten(2, 3)


def _heads(rows: Tensor, num_heads: int) -> Tensor:
    """[B, h, r, d] -> [B, H, t, d]."""
    return rows.unflatten(2, (num_heads // rows.shape[1], -1)).flatten(1, 2)


def _softmax(
    rows: Tensor, k: Tensor, num_queries: int, visible: Tensor, soft_cap: float | None
) -> _Softmax:
    """Compute the softmax of rows [B, h, r, d], of `num_queries` queries, over k [B, h, keys, d].

    `visible` is broadcastable to [B, 1, t, keys].
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    logits, slope = (rows @ k.mT).to(wide) * rows.shape[-1] ** -0.5, None
    if soft_cap is not None:
        turned = torch.tanh(logits / soft_cap)
        logits, slope = soft_cap * turned, 1 - turned.square()
    by_head = logits.unflatten(2, (-1, num_queries))
    by_head = by_head.masked_fill(~visible.unsqueeze(-3), -math.inf)
    return _Softmax(by_head.softmax(-1).flatten(2, 3), slope)
