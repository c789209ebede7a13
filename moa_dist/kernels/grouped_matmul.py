"""Grouped matrix product: consecutive groups of rows, each with a matrix of its own.

Shapes: A rows in all, E groups, I input and O output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _LoopGroupedMatmul(torch.autograd.Function):
    """One matrix product per group, written in place: the oracle, and the path on CPUs.

    A custom function rather than a loop under autograd, which would add a node per group
    and a full-size zero gradient of the weight for each.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        out = rows.new_empty(len(rows), weight.shape[-1])
        for group, matrix, result in zip(
            rows.split(counts), weight.unbind(), out.split(counts), strict=True
        ):
            torch.mm(group, matrix, out=result)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad = grads[0]
        need_rows, need_weight, _ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows) if need_rows else None
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


def grouped_matmul(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """`out[a] = rows[a] @ weight[e]` for the group e that row a is in.

    `rows` [A, I] sorted by group, `weight` [E, I, O], `counts` E group sizes that sum to A.
    Returns [A, O]. Every group stays in the graph: an empty one gets a zero gradient.
    """
    aligned = all(width * rows.element_size() % 16 == 0 for width in weight.shape[1:])
    # Otherwise grouped_mm is slow, or refuses.
    if rows.is_cuda and rows.dtype == torch.bfloat16 and aligned:
        ends = torch.tensor(counts, device=rows.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(rows, weight, offs=ends)
    result: Tensor = _LoopGroupedMatmul.apply(rows, weight, counts)
    return result
