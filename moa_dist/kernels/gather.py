"""Gathers rows so that gradients of rows that were gathered several times are summed in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moa_dist.kernels.row_map import sum_type


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,), grad = ctx.saved_tensors, grads[0]
        total = grad.new_zeros(ctx.num_rows, *grad.shape[1:], dtype=sum_type(grad))
        return total.index_add_(0, index, grad.to(total.dtype)).to(grad.dtype), None


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return `x[index]`: [X, D] -> [A, D]. Gradients are summed in fp32 or wider, and rounded once.

    The gradient of torch's own `index_select` rounds after every addition.
    """
    if sum_type(x) == x.dtype:
        return x.index_select(0, index)
    gathered: Tensor = _GatherRows.apply(x, index)
    return gathered
