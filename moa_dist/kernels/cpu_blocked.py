"""Routed experts on a CPU: a few experts at a time.

The rows that a part gathers are still in the cache when they are multiplied and added to the
result, and all of them are never held; the backward pass goes in the same order. Deterministic.
Shapes as in `row_map`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moa_dist.kernels.row_map import hidden_rows, sum_type
from moa_dist.kernels.saved import alloc_saved, hidden_gradient, weights_results

_PART_BYTES = 2 << 20
"""Gathered rows per part: with the experts' matrices and as many results they should stay near a
core. Of 0.5 to 16 MiB, 1 to 2 were fastest with one thread and with two."""


class _Part(NamedTuple):
    """Consecutive experts and their rows."""

    experts: slice
    rows: slice
    counts: list[int]


def _parts(counts: list[int], row_bytes: int) -> tuple[list[_Part], int]:
    """All experts, a cacheful at a time, and the largest number of rows in one part."""
    limit = max(_PART_BYTES // row_bytes, 1)
    parts: list[_Part] = []
    first = start = size = 0
    for expert, count in enumerate([*counts, limit]):
        if expert == len(counts) or (size and size + count > limit):
            rows = slice(start, start + size)
            parts.append(_Part(slice(first, expert), rows, counts[first:expert]))
            first, start, size = expert, start + size, 0
        size += count
    return parts, max(part.rows.stop - part.rows.start for part in parts)


def _multiply(
    rows: Tensor, matrices: Tensor, counts: list[int], out: Tensor, *, add: bool = False
) -> Tensor:
    """Rows [a, I] sorted by expert, times their expert's matrix [e, I, O]: set `out` [a, O], or
    add to it."""
    for group, matrix, result in zip(
        rows.split(counts), matrices.unbind(), out.split(counts), strict=True
    ):
        torch.addmm(result, group, matrix, beta=int(add), out=result)
    return out


def _outer(left: Tensor, right: Tensor, counts: list[int], out: Tensor) -> None:
    """`left.T @ right` of each expert's rows [a, I] and [a, O] -> `out` [e, I, O].

    Zeros for an expert without rows.
    """
    for a, b, result in zip(left.split(counts), right.split(counts), out.unbind(), strict=True):
        torch.mm(a.T, b, out=result)


def _scaled(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows [a, W] times weights [a], in the type of the rows."""
    return (rows * weight[:, None]).to(rows.dtype)


def _checked(counts: Tensor, num_rows: int, down: Tensor) -> list[int]:
    sizes: list[int] = counts.tolist()
    if len(sizes) != len(down) or sum(sizes) > num_rows:
        raise ValueError(f"{num_rows} rows and {len(down)} experts, but counts {sizes}")
    return sizes


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
    parts, most = _parts(
        _checked(counts, len(read), down), max(x.shape[1], down.shape[2]) * x.element_size()
    )
    # Buffers for one part serve all parts: fresh memory costs more than the products.
    gathered = x.new_empty(most, x.shape[1])
    results = x.new_empty(most, down.shape[2])
    saved_output, products = alloc_saved(x, weight, down, ups, len(read))
    save_outputs = weights_results(weight, down)
    y = x.new_zeros(num_output_rows, down.shape[2], dtype=sum_type(x))
    for experts, rows, sizes in parts:
        n = rows.stop - rows.start
        hidden = torch.index_select(x, 0, read[rows], out=gathered[:n])
        if ups:
            part = tuple(
                _multiply(hidden, up[experts], sizes, product[rows])
                for up, product in zip(ups, products, strict=True)
            )
            hidden = hidden_rows(part, activation)
        if weight is not None and not save_outputs:
            hidden = _scaled(hidden, weight[rows])
        out = saved_output[rows] if save_outputs else results[:n]
        out = _multiply(hidden, down[experts], sizes, out)
        if weight is not None and save_outputs:
            out = out * weight[rows, None]
        y.index_add_(0, write[rows], out.to(y.dtype))
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
    parts, most = _parts(counts.tolist(), max(x.shape[1], down.shape[2]) * x.element_size())
    wide = sum_type(x)
    gathered = x.new_empty(most, x.shape[1])
    gathered_grad = x.new_empty(most, down.shape[2])
    hidden_grad = x.new_empty(most, down.shape[1])
    grad_x = torch.zeros_like(x, dtype=wide)
    grad_weight = x.new_empty(0) if weight is None else torch.zeros_like(weight)
    grad_down, grad_ups = torch.empty_like(down), [torch.empty_like(up) for up in ups]
    save_outputs = weights_results(weight, down)
    for experts, rows, sizes in parts:
        n = rows.stop - rows.start
        from_x = hidden = torch.index_select(x, 0, read[rows], out=gathered[:n])
        grad_y = torch.index_select(grad, 0, write[rows], out=gathered_grad[:n])
        part = tuple(product[rows] for product in products)
        if ups:
            hidden = hidden_rows(part, activation)
        if weight is not None and save_outputs:
            torch.sum(saved_output[rows].to(wide) * grad_y, -1, out=grad_weight[rows])
            grad_y = torch.mul(grad_y, weight[rows, None], out=grad_y)
        weighs_hidden = weight is not None and not save_outputs
        scaled = _scaled(hidden, weight[rows]) if weight is not None and weighs_hidden else hidden
        _outer(scaled, grad_y, sizes, grad_down[experts])
        grad_h = _multiply(grad_y, down[experts].mT, sizes, hidden_grad[:n])
        if weight is not None and weighs_hidden:
            torch.sum(hidden.to(wide) * grad_h, -1, out=grad_weight[rows])
            grad_h = torch.mul(grad_h, weight[rows, None], out=grad_h)
        grad_rows = grad_h
        if ups:
            grad_products = hidden_gradient(grad_h, part, activation)
            for grad_product, grad_up in zip(grad_products, grad_ups, strict=True):
                _outer(from_x, grad_product, sizes, grad_up[experts])
            grad_rows = from_x  # which is not needed any more
            for i, (grad_product, up) in enumerate(zip(grad_products, ups, strict=True)):
                _multiply(grad_product, up[experts].mT, sizes, grad_rows, add=i > 0)
        grad_x.index_add_(0, read[rows], grad_rows.to(wide))
    return grad_x.to(x.dtype), grad_weight, grad_down, grad_ups
