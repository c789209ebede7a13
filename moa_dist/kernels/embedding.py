"""Rows of a table by index, whose gradients are summed in fp32 or wider on every device.

Shapes: V rows of width D.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_dist.kernels.gradient_sum import GradientSum, is_widened, sum_of


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, table: Tensor, handle: Tensor | None, total: GradientSum | None
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.total = len(table), total
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), (grad,), total = ctx.saved_tensors, grads, ctx.total
        # In bf16, torch adds row by row on a CPU; on a GPU it adds in fp32 and rounds the sum.
        is_wide = total is not None or is_widened(grad)
        rows = grad.to(torch.promote_types(grad.dtype, torch.float32)) if is_wide else grad
        of_table = torch.ops.aten.embedding_dense_backward(rows, ids, ctx.num_rows, -1, False)
        if total is None:
            return None, of_table.to(grad.dtype), None, None
        total.add(of_table)
        return None, None, None, None


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Return rows of `table` [V, D] for int64 ids [...], as [..., D]."""
    rows: Tensor = _Lookup.apply(ids, table, *sum_of(table))
    return rows
