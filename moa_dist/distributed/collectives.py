"""Collectives that carry gradients.

Every rank of a group must enter them in the same order, also with nothing to send.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(parts: list[Tensor]) -> list[Tensor]:
    """Each tensor summed over all ranks, without gradient, in one collective.

    Adds up in fp64, so integers are exact to 2^53. Shapes must be equal on all ranks.
    """
    flat = torch.cat([part.detach().double().flatten() for part in parts])
    dist.all_reduce(flat)
    sums = flat.split([part.numel() for part in parts])
    return [s.view_as(part).to(part.dtype) for s, part in zip(sums, parts, strict=True)]


class _AllToAllRows(torch.autograd.Function):
    """Rows to every rank; gradients take the same way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


def all_to_all_rows(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send `sent[p]` consecutive rows to each rank p, get `received[p]` from it.

    `rows` [sum(sent), ...] -> [sum(received), ...] in rank order. The gradient of a row is
    the gradient at the place where it arrived: nothing is summed or averaged here.
    """
    result: Tensor = _AllToAllRows.apply(rows, sent, received, group)
    return result


def all_to_all_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[P, ...] -> [P, ...]: entry p goes to rank p, entry q of the result came from rank q."""
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts.contiguous(), group=group)
    return out


class _AllGatherShards(torch.autograd.Function):
    """Shards of all ranks; the gradient of a shard sums over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        gathered = shard.new_empty(len(sizes) * len(shard), *shard.shape[1:])
        dist.all_gather_into_tensor(gathered, shard.contiguous(), group=group)
        return torch.cat([s[:n] for s, n in zip(gathered.split(len(shard)), sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        sizes, group = ctx.sizes, ctx.group
        padded = grads[0].new_zeros(len(sizes), max(sizes), *grads[0].shape[1:])
        for rank, part in enumerate(grads[0].split(sizes)):
            padded[rank, : len(part)] = part
        mine = torch.empty_like(padded[0])
        dist.reduce_scatter_tensor(mine, padded.flatten(0, 1), group=group)
        return mine, None, None


def all_gather_shards(shard: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """The first `sizes[rank]` rows of each rank's shard -> [sum(sizes), ...], in rank order.

    `shard` [max(sizes), ...] has one shape on all ranks. The gradient is summed over the group
    and scattered back, in one collective.
    """
    result: Tensor = _AllGatherShards.apply(shard, sizes, group)
    return result
