"""Routed experts step by step: gather all rows, multiply each by its expert's matrices, add up.

What an accelerator's grouped matrix product needs, and the oracle of the other kernels. Shapes as
in `trip`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_dist.kernels.grouped_matmul import grouped_matmul
from moa_dist.kernels.trip import Experts, Trip, hidden_rows, sum_type


def routed_at_once(experts: Experts, x: Tensor, trip: Trip) -> Tensor:
    """`routed_experts` under autograd; holds [A, D] and [A, O]."""
    return add_up(multiply(experts, gather(x, trip), trip), trip)


def gather(x: Tensor, trip: Trip) -> Tensor:
    """[X, D] -> [A, D] in the order of experts."""
    return _only_taken(x.index_select(0, trip.read), trip)


def multiply(experts: Experts, rows: Tensor, trip: Trip) -> Tensor:
    """[A, D] -> [A, O], each row by its expert."""
    if experts.ups:
        products = tuple(grouped_matmul(rows, up, trip.counts) for up in experts.ups)
        rows = hidden_rows(products, experts.activation)
    return grouped_matmul(rows, experts.down, trip.counts)


def add_up(rows: Tensor, trip: Trip) -> Tensor:
    """[A, O] -> [Y, O], weighted."""
    wide = _only_taken(rows, trip).to(sum_type(rows))
    if trip.weight is not None:
        wide = wide * trip.weight[:, None]
    y = wide.new_zeros(trip.num_written, wide.shape[-1])
    return y.index_add(0, trip.write, wide).to(rows.dtype)


def _only_taken(rows: Tensor, trip: Trip) -> Tensor:
    """Zero where no expert takes a row: grouped products leave there what was in memory.

    Before them for the gradient's sake, after them for the value's.
    """
    if trip.all_taken:
        return rows
    taken = torch.arange(len(rows), device=rows.device) < trip.counts.sum()
    return rows.where(taken[:, None], 0)
