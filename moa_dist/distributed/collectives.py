"""Collectives that carry gradients.

Every rank of a group must enter them in the same order, also with nothing to send.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
