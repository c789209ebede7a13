"""Tensors that the fused kernels keep between forward and backward, and the gradients they return.

Shapes as in `row_map`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.kernels.activations import ACTIVATIONS
from moa_dist.kernels.gradient_sum import Into
from moa_dist.kernels.row_map import ExpertWeights, RowMap


class Saved(NamedTuple):
    """Results of forward that backward would otherwise compute again."""

    outputs: Tensor
    """[A, O], unweighted results of the experts where `scales_outputs`; else [0, O]."""
    products: tuple[Tensor, ...]
    """Products with `ups`, each [A, F]."""


class Gradients(NamedTuple):
    """Gradients of everything that forward is differentiable in."""

    x: Tensor
    """[X, D]."""
    weight: Tensor
    """[A]; [0] if the row map has no weights."""
    down: Tensor
    """As `ExpertWeights.down`."""
    ups: tuple[Tensor, ...]
    """As `ExpertWeights.ups`."""


def fresh(experts: ExpertWeights) -> tuple[Into, ...]:
    """Allocate gradients of all matrices, `down` first."""
    return tuple(
        Into(torch.empty_like(matrix, memory_format=torch.contiguous_format))
        for matrix in experts.tensors()
    )


def scales_outputs(experts: ExpertWeights, row_map: RowMap) -> bool:
    """Whether the row map's weights multiply the results rather than the hidden rows.

    They go to the narrower side of `down`, where their gradient `<result, grad>` is cheaper too.
    """
    return row_map.weight is not None and experts.down.shape[1] > experts.down.shape[2]


def alloc_saved(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Saved:
    """Allocate, without initializing it, what forward fills for backward."""
    num_rows = len(row_map.read.ids)
    num_outputs = num_rows if scales_outputs(experts, row_map) else 0
    return Saved(
        x.new_empty(num_outputs, experts.down.shape[2]),
        tuple(x.new_empty(num_rows, up.shape[2]) for up in experts.ups),
    )


def hidden_gradient(
    grad: Tensor, products: tuple[Tensor, ...], activation: str
) -> tuple[Tensor, ...]:
    """Return the gradient of each product [a, F], given that of `row_map.hidden_rows`."""
    act = ACTIVATIONS[activation]
    if len(products) == 1:
        return (act.gradient(grad, products[0]),)
    up, gate = products
    return act.gradient(grad * gate, up), grad * act.value(up)
