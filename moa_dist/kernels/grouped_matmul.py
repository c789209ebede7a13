"""Grouped matrix product: consecutive groups of rows, each multiplied by its own matrix.

Shapes: A rows in all, E groups, I input and O output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _LoopGroupedMatmul(torch.autograd.Function):
    """One matrix product per group, written in place; the oracle of the others.

    A custom function rather than a loop under autograd, which would add a node per group
    and a full-size zero gradient of the weight for each.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        if rows.is_meta:  # there are no counts to read, nor anything to multiply
            return rows.new_empty(len(rows), weight.shape[-1])
        ctx.counts = sizes = counts.tolist()
        total = sum(sizes)
        if len(sizes) != len(weight) or total > len(rows):
            raise ValueError(f"{len(rows)} rows and {len(weight)} matrices, but counts {sizes}")
        out = rows.new_zeros(len(rows), weight.shape[-1])
        for group, matrix, result in zip(
            rows[:total].split(sizes), weight.unbind(), out[:total].split(sizes), strict=True
        ):
            torch.mm(group, matrix, out=result)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad = grads[0]
        need_rows, need_weight, _ = ctx.needs_input_grad
        grad_rows = torch.zeros_like(rows) if need_rows else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        start = 0
        for e, count in enumerate(ctx.counts):
            group = slice(start, start + count)
            if grad_rows is not None:
                torch.mm(grad[group], weight[e].T, out=grad_rows[group])
            if grad_weight is not None:  # an empty group gives zeros, never None
                torch.mm(rows[group].T, grad[group], out=grad_weight[e])
            start += count
        return grad_rows, grad_weight, None


_MAX_GROUPS = 1023
"""Number of groups that torch's grouped product takes on CUDA."""


def grouped_matmul_fits(rows: Tensor, *weights: Tensor) -> bool:
    """Whether torch's grouped product supports this device, type, number of groups and widths."""
    if any(len(weight) > _MAX_GROUPS for weight in weights):
        return False
    if rows.dtype != torch.bfloat16 or rows.device.type == "cpu":
        return False
    return all(w * rows.element_size() % 16 == 0 for m in weights for w in m.shape[1:])


def grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Compute `out[a] = rows[a] @ weight[e]` for the group e that row a is in.

    `rows` [A, I] sorted by group, `weight` [E, I, O], `counts` [E] int64 group sizes. Returns
    [A, O]. Rows after the last group belong to none; their result and their gradient are
    undefined. Every group stays in the graph, so an empty one gets a zero gradient, not None.
    """
    if grouped_matmul_fits(rows, weight):
        return F.grouped_mm(rows, weight, offs=counts.cumsum(0, dtype=torch.int32))
    result: Tensor = _LoopGroupedMatmul.apply(rows, weight, counts)
    return result
