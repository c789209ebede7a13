"""Routed experts on a GPU by Triton: gathering and adding happen inside the products.

For any widths and types up to fp32. The order in which rows are added up changes from run to run.
Shapes as in `row_map`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moa_dist.kernels.row_map import hidden_rows, sum_type
from moa_dist.kernels.saved import alloc_saved, hidden_gradient, weights_results


def forward(
    x: Tensor,
    weight: Tensor | None,
    down: Tensor,
    ups: Sequence[Tensor],
    read: Tensor,
    write: Tensor,
    counts: Tensor,
    num_output_rows: int,
    activation: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y [Y, O], and what is saved for `backward`, see `alloc_saved`."""
    from moa_dist.kernels.triton_kernels import add_product, tiles_of

    x = x.contiguous()
    tiles = tiles_of(counts, len(read))
    saved_output, products = alloc_saved(x, weight, down, ups, len(read))
    for saved in (saved_output, *products):
        saved.zero_()  # rows of no expert: what was in memory there would reach gradients
    for up, product in zip(ups, products, strict=True):
        add_product(x, up, product, tiles, read=read)
    y = x.new_zeros(num_output_rows, down.shape[2], dtype=sum_type(x))
    if weight is not None and weights_results(weight, down):
        left = hidden_rows(tuple(products), activation) if ups else x
        add_product(left, down, saved_output, tiles, read=None if ups else read)
        y.index_add_(0, write, saved_output * weight[:, None])
    elif ups:
        hidden = hidden_rows(tuple(products), activation)
        add_product(hidden, down, y, tiles, write=write, scale=weight)
    else:
        add_product(x, down, y, tiles, read=read, write=write, scale=weight)
    return y.to(x.dtype), saved_output, products


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    down: Tensor,
    ups: Sequence[Tensor],
    read: Tensor,
    write: Tensor,
    counts: Tensor,
    saved_output: Tensor,
    products: Sequence[Tensor],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of x, weight (empty if there is none), down and ups."""
    from moa_dist.kernels.triton_kernels import add_product, outer_products, tiles_of

    x, grad = x.contiguous(), grad.contiguous()
    tiles = tiles_of(counts, len(read))
    grad_x = torch.zeros_like(x, dtype=sum_type(x))
    grad_weight = x.new_empty(0)
    if not ups and (weight is None or weights_results(weight, down)):
        # The only case in which gathered rows could be wide: they are never made.
        if weight is not None:
            grad_weight = (saved_output * grad[write]).sum(-1, dtype=weight.dtype)
        add_product(grad, down.mT, grad_x, tiles, read=write, write=read, scale=weight)
        grad_down = outer_products(x, grad, down, tiles, read=read, write=write, scale=weight)
        return grad_x.to(x.dtype), grad_weight, grad_down, []

    hidden = hidden_rows(tuple(products), activation) if ups else x[read]
    grad_hidden = torch.zeros_like(hidden)
    add_product(grad, down.mT, grad_hidden, tiles, read=write)
    if weight is not None:
        pair = (
            (saved_output, grad[write]) if weights_results(weight, down) else (hidden, grad_hidden)
        )
        grad_weight = torch.linalg.vecdot(*(t.to(weight.dtype) for t in pair))
        grad_hidden = (grad_hidden * weight[:, None]).to(x.dtype)
    grad_down = outer_products(hidden, grad, down, tiles, write=write, scale=weight)
    if not ups:
        grad_x.index_add_(0, read, grad_hidden.to(grad_x.dtype))
        return grad_x.to(x.dtype), grad_weight, grad_down, []

    grad_products = hidden_gradient(grad_hidden, tuple(products), activation)
    grad_ups = []
    for up, grad_product in zip(ups, grad_products, strict=True):
        grad_ups.append(outer_products(x, grad_product, up, tiles, read=read))
        add_product(grad_product, up.mT, grad_x, tiles, write=read)
    return grad_x.to(x.dtype), grad_weight, grad_down, grad_ups
