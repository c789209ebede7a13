"""Routed experts on a GPU by Triton: gathering and adding happen inside the products.

Works for any widths and for types up to fp32. The order in which rows are summed changes from run
to run. Shapes as in `row_map`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moa_dist.kernels.row_map import ExpertWeights, RowMap, hidden_rows, sum_type
from moa_dist.kernels.saved import (
    Gradients,
    Saved,
    alloc_saved,
    hidden_gradient,
    scales_outputs,
)


def forward(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> tuple[Tensor, Saved]:
    """Compute y [Y, O], and what `backward` needs."""
    from moa_dist.kernels.triton_kernels import add_product, tiles_of

    down, ups, activation = experts
    weight, read, write = row_map.weight, row_map.read, row_map.write
    x = x.contiguous()
    tiles = tiles_of(row_map.counts, len(read))
    saved = alloc_saved(experts, x, row_map)
    for tensor in (saved.outputs, *saved.products):
        tensor.zero_()  # else uninitialized rows, of no expert, would reach gradients
    for up, product in zip(ups, saved.products, strict=True):
        add_product(x, up, product, tiles, read=read)
    y = x.new_zeros(row_map.num_output_rows, down.shape[2], dtype=sum_type(x))
    if weight is not None and scales_outputs(experts, row_map):
        left = hidden_rows(saved.products, activation) if ups else x
        add_product(left, down, saved.outputs, tiles, read=None if ups else read)
        y.index_add_(0, write, saved.outputs * weight[:, None])
    elif ups:
        hidden = hidden_rows(saved.products, activation)
        add_product(hidden, down, y, tiles, write=write, scale=weight)
    else:
        add_product(x, down, y, tiles, read=read, write=write, scale=weight)
    return y.to(x.dtype), saved


def backward(
    grad: Tensor, experts: ExpertWeights, x: Tensor, row_map: RowMap, saved: Saved
) -> Gradients:
    """Compute all gradients, given that of y."""
    from moa_dist.kernels.triton_kernels import add_product, outer_products, tiles_of

    down, ups, activation = experts
    weight, read, write = row_map.weight, row_map.read, row_map.write
    x, grad = x.contiguous(), grad.contiguous()
    tiles = tiles_of(row_map.counts, len(read))
    grad_x = torch.zeros_like(x, dtype=sum_type(x))
    grad_weight = x.new_empty(0)
    after_down = scales_outputs(experts, row_map)
    if not ups and (weight is None or after_down):
        # The only case in which gathered rows could be wide: they are never made.
        if weight is not None:
            grad_weight = (saved.outputs * grad[write]).sum(-1, dtype=weight.dtype)
        add_product(grad, down.mT, grad_x, tiles, read=write, write=read, scale=weight)
        grad_down = outer_products(x, grad, down, tiles, read=read, write=write, scale=weight)
        return Gradients(grad_x.to(x.dtype), grad_weight, grad_down, ())

    hidden = hidden_rows(saved.products, activation) if ups else x[read]
    grad_hidden = torch.zeros_like(hidden)
    add_product(grad, down.mT, grad_hidden, tiles, read=write)
    if weight is not None:
        pair = (saved.outputs, grad[write]) if after_down else (hidden, grad_hidden)
        grad_weight = torch.linalg.vecdot(*(t.to(weight.dtype) for t in pair))
        grad_hidden = (grad_hidden * weight[:, None]).to(x.dtype)
    grad_down = outer_products(hidden, grad, down, tiles, write=write, scale=weight)
    if not ups:
        grad_x.index_add_(0, read, grad_hidden.to(grad_x.dtype))
        return Gradients(grad_x.to(x.dtype), grad_weight, grad_down, ())

    grad_ups = []
    for up, grad_product in zip(
        ups, hidden_gradient(grad_hidden, saved.products, activation), strict=True
    ):
        grad_ups.append(outer_products(x, grad_product, up, tiles, read=read))
        add_product(grad_product, up.mT, grad_x, tiles, write=read)
    return Gradients(grad_x.to(x.dtype), grad_weight, grad_down, tuple(grad_ups))
