"""Routed experts on a CPU, a block of experts at a time.

The rows gathered for a block are still in the cache when they are multiplied and added to the
result, and the gathered rows of all blocks are never held together. The backward pass goes through
the blocks in the same order. Deterministic. Shapes as in `row_map`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.kernels.cpu_products import multiply, outer
from moa_dist.kernels.gradient_sum import Into
from moa_dist.kernels.row_map import ExpertWeights, RowMap, hidden_rows, sum_type
from moa_dist.kernels.saved import (
    Gradients,
    Saved,
    alloc_saved,
    fresh,
    hidden_gradient,
    scales_outputs,
)

_BLOCK_BYTES = 2 << 20
"""Gathered rows per block: with the experts' matrices and as many results they should stay near a
core. Of 0.5 to 16 MiB, 1 to 2 were fastest with one thread and with two."""


class _Block(NamedTuple):
    """Consecutive experts and their rows."""

    experts: slice
    rows: slice
    counts: list[int]


def _blocks(counts: list[int], row_bytes: int) -> tuple[list[_Block], int]:
    """Divide all experts into blocks that fit a cache; also return the most rows of any block."""
    limit = max(_BLOCK_BYTES // row_bytes, 1)
    blocks: list[_Block] = []
    first = start = size = 0
    for expert, count in enumerate([*counts, limit]):
        if expert == len(counts) or (size and size + count > limit):
            rows = slice(start, start + size)
            blocks.append(_Block(slice(first, expert), rows, counts[first:expert]))
            first, start, size = expert, start + size, 0
        size += count
    return blocks, max(block.rows.stop - block.rows.start for block in blocks)


def _scaled(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows [a, W] times weights [a], in the type of the rows."""
    return (rows * weight[:, None]).to(rows.dtype)


def _checked_counts(experts: ExpertWeights, row_map: RowMap) -> list[int]:
    counts: list[int] = row_map.counts.tolist()
    num_rows, num_experts = len(row_map.read.ids), len(experts.down)
    if len(counts) != num_experts or sum(counts) > num_rows:
        raise ValueError(f"{num_rows} rows and {num_experts} experts, but counts {counts}")
    return counts


def _row_bytes(experts: ExpertWeights, x: Tensor) -> int:
    """Return the size of the wider of an input and an output row."""
    return max(x.shape[1], experts.down.shape[2]) * x.element_size()


def forward(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> tuple[Tensor, Saved]:
    """Compute y [Y, O], and what `backward` needs."""
    down, ups, activation = experts
    weight, read, write = row_map.weight, row_map.read.ids, row_map.write.ids
    blocks, most = _blocks(_checked_counts(experts, row_map), _row_bytes(experts, x))
    # Buffers for one block serve all blocks: fresh memory costs more than the products.
    gathered = x.new_empty(most, x.shape[1])
    results = x.new_empty(most, down.shape[2])
    saved = alloc_saved(experts, x, row_map)
    after_down = scales_outputs(experts, row_map)
    y = x.new_zeros(row_map.write.num, down.shape[2], dtype=sum_type(x))
    for block, rows, counts in blocks:
        n = rows.stop - rows.start
        hidden = torch.index_select(x, 0, read[rows], out=gathered[:n])
        if ups:
            products = tuple(
                multiply(hidden, up[block], counts, product[rows])
                for up, product in zip(ups, saved.products, strict=True)
            )
            hidden = hidden_rows(products, activation)
        if weight is not None and not after_down:
            hidden = _scaled(hidden, weight[rows])
        out = saved.outputs[rows] if after_down else results[:n]
        out = multiply(hidden, down[block], counts, out)
        if weight is not None and after_down:
            out = out * weight[rows, None]
        y.index_add_(0, write[rows], out.to(y.dtype))
    return y.to(x.dtype), saved


def backward(
    grad: Tensor,
    experts: ExpertWeights,
    x: Tensor,
    row_map: RowMap,
    saved: Saved,
    into: tuple[Into, ...] | None = None,
) -> Gradients:
    """Compute all gradients, given that of y; those of the matrices `into` what is given."""
    down, ups, activation = experts
    into_down, *into_ups = into or fresh(experts)
    weight, read, write = row_map.weight, row_map.read.ids, row_map.write.ids
    blocks, most = _blocks(row_map.counts.tolist(), _row_bytes(experts, x))
    wide = sum_type(x)
    gathered = x.new_empty(most, x.shape[1])
    gathered_grad = x.new_empty(most, down.shape[2])
    hidden_grad = x.new_empty(most, down.shape[1])
    grad_x = torch.zeros_like(x, dtype=wide)
    grad_weight = x.new_empty(0) if weight is None else torch.zeros_like(weight)
    after_down = scales_outputs(experts, row_map)
    for block in blocks:
        of_block, rows, counts = block
        n = rows.stop - rows.start
        from_x = hidden = torch.index_select(x, 0, read[rows], out=gathered[:n])
        grad_y = torch.index_select(grad, 0, write[rows], out=gathered_grad[:n])
        products = tuple(product[rows] for product in saved.products)
        if ups:
            hidden = hidden_rows(products, activation)
        if weight is not None and after_down:
            torch.sum(saved.outputs[rows].to(wide) * grad_y, -1, out=grad_weight[rows])
            grad_y = torch.mul(grad_y, weight[rows, None], out=grad_y)
        scales_hidden = weight is not None and not after_down
        scaled = _scaled(hidden, weight[rows]) if weight is not None and scales_hidden else hidden
        outer(scaled, grad_y, counts, into_down, of_block)
        grad_h = multiply(grad_y, down[of_block].mT, counts, hidden_grad[:n])
        if weight is not None and scales_hidden:
            torch.sum(hidden.to(wide) * grad_h, -1, out=grad_weight[rows])
            grad_h = torch.mul(grad_h, weight[rows, None], out=grad_h)
        grad_rows = grad_h
        if ups:
            grad_products = hidden_gradient(grad_h, products, activation)
            for grad_product, into_up in zip(grad_products, into_ups, strict=True):
                outer(from_x, grad_product, counts, into_up, of_block)
            grad_rows = from_x  # no longer needed, so its buffer takes the result
            for i, (grad_product, up) in enumerate(zip(grad_products, ups, strict=True)):
                multiply(grad_product, up[of_block].mT, counts, grad_rows, add=i > 0)
        grad_x.index_add_(0, read[rows], grad_rows.to(wide))
    grad_ups = tuple(into_up.out for into_up in into_ups)
    return Gradients(grad_x.to(x.dtype), grad_weight, into_down.out, grad_ups)
