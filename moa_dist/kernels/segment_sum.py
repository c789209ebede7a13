"""Sums of rows that share a target, and their gradients. Shapes as in `row_map`.

Gathering and summing are each other's gradient. Each row of the result adds up its own terms in
fp32 or wider and is rounded once; on GPUs one kernel does this without atomics, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moa_dist.kernels.hardware import Hardware
from moa_dist.kernels.row_map import Rows, sum_type


def segment_sum(rows: Tensor, to: Rows) -> Tensor:
    """Compute `out[to.ids[a]] += rows[a]`: [A, O] -> [to.num, O], in the type of the rows."""
    if Hardware.of(rows.device).runs_triton and rows.dtype != torch.float64:
        from moa_dist.kernels.triton_sums import sum_by_row

        return sum_by_row(rows.contiguous(), to)
    wide = rows.to(sum_type(rows))
    return wide.new_zeros(to.num, rows.shape[1]).index_add_(0, to.ids, wide).to(rows.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, *rest: Any) -> Tensor:
        _save(ctx, ids, *rest)
        return x.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return segment_sum(grads[0], _saved(ctx)), None, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *to: Any) -> Tensor:
        _save(ctx, *to)
        return segment_sum(rows, Rows(*to))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, _saved(ctx).ids), None, None, None, None


def _save(ctx: Any, ids: Tensor, order: Tensor, offsets: Tensor | None, num: int) -> None:
    ctx.save_for_backward(ids, order, offsets)  # so that they too are recomputed or offloaded
    ctx.num = num


def _saved(ctx: Any) -> Rows:
    ids, order, offsets = ctx.saved_tensors
    return Rows(ids, order, offsets, ctx.num)


def gather_rows(x: Tensor, rows: Rows) -> Tensor:
    """Gather `x[rows.ids]`: [X, D] -> [A, D]. The gradient of a row sums those of its copies."""
    gathered: Tensor = _Gather.apply(x, *rows)
    return gathered


def sum_rows(rows: Tensor, to: Rows) -> Tensor:
    """Sum rows [A, O] by their target: `out[i]` is the sum of `rows[a]` with to.ids[a] = i."""
    summed: Tensor = _Sum.apply(rows, *to)
    return summed


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return values.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, *ctx.saved_tensors), None, None


def permute(values: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return `values[order]`. Unlike an index's, its gradient is a gather by `inverse` too."""
    permuted: Tensor = _Permute.apply(values, order, inverse)
    return permuted
