"""Routed experts step by step: gather all rows, multiply each by its expert's matrices, add up.

This is the form that an accelerator's grouped matrix product needs, and the oracle of the other
kernels. Shapes as in `row_map`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_dist.kernels.gradient_sum import alias
from moa_dist.kernels.grouped_matmul import grouped_matmul
from moa_dist.kernels.row_map import ExpertWeights, RowMap, hidden_rows, sum_type
from moa_dist.kernels.segment_sum import gather_rows


def grouped_experts(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Tensor:
    """Compute `routed_experts` under plain autograd; holds [A, D] and [A, O]."""
    experts = experts._replace(down=alias(experts.down), ups=tuple(map(alias, experts.ups)))
    return add_up(multiply(experts, gather(x, row_map), row_map), row_map)


def gather(x: Tensor, row_map: RowMap) -> Tensor:
    """Gather the rows of all assignments, sorted by expert: [X, D] -> [A, D]."""
    return _zero_unassigned(gather_rows(x, row_map.read), row_map)


def multiply(experts: ExpertWeights, rows: Tensor, row_map: RowMap) -> Tensor:
    """Apply to each row its expert: [A, D] -> [A, O]."""
    if experts.ups:
        products = tuple(grouped_matmul(rows, up, row_map.counts) for up in experts.ups)
        rows = hidden_rows(products, experts.activation)
    return grouped_matmul(rows, experts.down, row_map.counts)


def add_up(rows: Tensor, row_map: RowMap) -> Tensor:
    """Add the weighted results to their output rows: [A, O] -> [Y, O]."""
    wide = _zero_unassigned(rows, row_map).to(sum_type(rows))
    if row_map.weight is not None:
        wide = wide * row_map.weight[:, None]
    y = wide.new_zeros(row_map.write.num, wide.shape[-1])
    return y.index_add(0, row_map.write.ids, wide).to(rows.dtype)


def _zero_unassigned(rows: Tensor, row_map: RowMap) -> Tensor:
    """Set rows without an expert to zero, since grouped products leave them uninitialized.

    Before the products this protects the gradient, after them the value.
    """
    if row_map.is_dropless:
        return rows
    assigned = torch.arange(len(rows), device=rows.device) < row_map.counts.sum()
    return rows.where(assigned[:, None], 0)
