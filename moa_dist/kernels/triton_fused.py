"""Routed experts on a GPU by Triton: rows are gathered inside the products, and every result is
written once, in the type of the rows.

Results that share an output row are then summed in fp32 by one more kernel: no atomics, so results
do not change from run to run. Router weights multiply the narrower side of `down`. Works for any
widths and for types up to fp32. Shapes as in `row_map`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moa_dist.kernels.gradient_sum import Into
from moa_dist.kernels.row_map import ExpertWeights, RowMap, Rows
from moa_dist.kernels.saved import Gradients, Saved, alloc_saved, fresh, scales_outputs

if TYPE_CHECKING:  # Triton may be missing where the CPU kernel runs
    from moa_dist.kernels.triton_tiles import Tiles


def forward(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> tuple[Tensor, Saved]:
    """Compute y [Y, O], and what `backward` needs."""
    from moa_dist.kernels.triton_products import hidden_products, product
    from moa_dist.kernels.triton_sums import sum_by_row

    down, ups, activation = experts
    x, weight, read = x.contiguous(), row_map.weight, row_map.read.ids
    tiles = _tiles(x, row_map)
    saved = alloc_saved(experts, x, row_map)
    after_down = scales_outputs(experts, row_map)
    left, scale = x, None if after_down else weight
    gathered: Tensor | None = read
    if ups:
        left = hidden_products(x, read, ups, scale, activation, saved.products, tiles)
        gathered = scale = None
    if not after_down:
        return _product_by_row(
            [(left, down)], row_map.write, tiles, row_map, read=gathered, scale=scale
        ), saved
    product([(left, down)], saved.outputs, tiles, read=gathered)
    num_valid = _num_valid(row_map, tiles)
    return sum_by_row(saved.outputs, row_map.write, scale=weight, num_valid=num_valid), saved


def backward(
    grad: Tensor,
    experts: ExpertWeights,
    x: Tensor,
    row_map: RowMap,
    saved: Saved,
    into: tuple[Into, ...] | None = None,
) -> Gradients:
    """Compute all gradients, given that of y; those of the matrices `into` what is given."""
    from moa_dist.kernels.triton_gradients import hidden_gradients, outer_products, weigh_gradient
    from moa_dist.kernels.triton_sums import sum_by_row

    down, ups, activation = experts
    into_down, *into_ups = into or fresh(experts)
    x, grad, read = x.contiguous(), grad.contiguous(), row_map.read.ids
    tiles = _tiles(x, row_map)
    weight, grad_weight = row_map.weight, x.new_empty(0)
    gathered: Tensor | None = row_map.write.ids
    if weight is not None and scales_outputs(experts, row_map):
        grad_weight, grad = weigh_gradient(
            saved.outputs, grad, row_map.write.ids, weight, tiles.num_valid
        )
        weight = gathered = None
    if not ups and weight is None:
        outer_products(x, grad, into_down, tiles, read_left=read, read_right=gathered)
        grad_x = _product_by_row(
            [(grad, down)], row_map.read, tiles, row_map, read=gathered, transposed=True
        )
        return Gradients(grad_x, grad_weight, into_down.out, ())
    inner = hidden_gradients(
        grad,
        gathered,
        down,
        saved.products if ups else (x,),
        None if ups else read,
        weight,
        activation if ups else None,
        tiles,
        is_dropless=row_map.is_dropless,
    )
    grad_weight = grad_weight if inner.weight is None else inner.weight
    outer_products(inner.hidden, grad, into_down, tiles, read_right=gathered)
    for grad_product, into_up in zip(inner.products, into_ups, strict=False):
        outer_products(x, grad_product, into_up, tiles, read_left=read)
    if ups:
        pairs = list(zip(inner.products, ups, strict=True))
        grad_x = _product_by_row(pairs, row_map.read, tiles, row_map, transposed=True)
    else:
        grad_x = sum_by_row(inner.products[0], row_map.read, num_valid=_num_valid(row_map, tiles))
    grad_ups = tuple(into_up.out for into_up in into_ups)
    return Gradients(grad_x, grad_weight, into_down.out, grad_ups)


def _tiles(x: Tensor, row_map: RowMap) -> Tiles:
    from moa_dist.kernels.triton_tiles import rows_per_tile, tiles_of

    num_rows, counts = len(row_map.read.ids), row_map.counts
    return tiles_of(counts, num_rows, rows_per_tile(x, num_rows, len(counts)))


def _num_valid(row_map: RowMap, tiles: Tiles) -> Tensor | None:
    """Return how many assignments have an expert, or None if all have."""
    return None if row_map.is_dropless else tiles.num_valid


def _product_by_row(
    pairs: list[tuple[Tensor, Tensor]],
    to: Rows,
    tiles: Tiles,
    row_map: RowMap,
    *,
    read: Tensor | None = None,
    scale: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Compute products as `triton_products.product` does, and sum them by row of `to`.

    Where every row has one assignment, results are written there directly.
    """
    from moa_dist.kernels.triton_products import product
    from moa_dist.kernels.triton_sums import sum_by_row

    (left, matrices), *_ = pairs
    width = matrices.shape[1 if transposed else 2]
    if to.are_permuted():
        make = torch.empty if row_map.is_dropless else torch.zeros
        y = make(to.num, width, dtype=left.dtype, device=left.device)
        product(pairs, y, tiles, read=read, scale=scale, write=to.ids, transposed=transposed)
        return y
    results = left.new_empty(len(to.ids), width)
    product(pairs, results, tiles, read=read, scale=scale, transposed=transposed)
    return sum_by_row(results, to, num_valid=_num_valid(row_map, tiles))
