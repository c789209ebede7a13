"""Triton kernels of the backward pass, of the same form as those of `triton_products`.

The gradient of x is `triton_products.product` itself. Shapes as in `row_map`; a product's input and
output widths are I and O.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moa_dist.kernels.gradient_sum import Into
from moa_dist.kernels.triton_operands import (
    activate,
    add_product,
    precision,
    quarters,
    slope,
    source_rows,
)
from moa_dist.kernels.triton_tiles import Tiles, find_tile, shape_of


class HiddenGradients(NamedTuple):
    """Gradients on the inner side of `down`."""

    hidden: Tensor
    """[A, F], the rows that `down` was multiplied by, weighted."""
    products: tuple[Tensor, ...]
    """[A, F] each, gradients of the products with `ups`; without those, that of each row of x."""
    weight: Tensor | None
    """[A] fp32; None if there is no weight."""


def weigh_gradient(
    outputs: Tensor, grad: Tensor, write: Tensor, weight: Tensor, num_valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `<outputs[a], grad[write[a]]>` [A], the gradient of `weight`, zero from `num_valid` on
    and `weight[a] * grad[write[a]]` [A, O]."""
    num_rows, width = outputs.shape
    grad_weight, weighted = torch.empty_like(weight), torch.empty_like(outputs)
    columns = max(16, min(256, triton.next_power_of_2(width)))
    rows = 4096 // columns
    _weigh_gradient[(triton.cdiv(num_rows, rows),)](
        outputs,
        grad,
        write,
        weight,
        num_valid,
        grad_weight,
        weighted,
        num_rows,
        WIDTH=width,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
    )
    return grad_weight, weighted


def hidden_gradients(
    grad: Tensor,
    read_grad: Tensor | None,
    down: Tensor,
    inner: tuple[Tensor, ...],
    read_inner: Tensor | None,
    weight: Tensor | None,
    activation: str | None,
    tiles: Tiles,
    *,
    is_dropless: bool,
) -> HiddenGradients:
    """Return all gradients that follow from `grad[read_grad] @ down.mT`, in one kernel.

    `inner` are the products with `ups`; without those x, gathered by `read_inner`, and no
    `activation`.
    """
    width = down.shape[1]
    num_rows = len(grad) if read_grad is None else len(read_grad)
    hidden = grad.new_empty(num_rows, width)
    products = tuple(torch.empty_like(hidden) for _ in inner)
    shape = shape_of(grad, tiles.rows, down.shape[2], width, len(inner))
    column_tiles = triton.cdiv(width, shape.columns)
    partial = None
    if weight is not None:  # one share per column tile
        make = torch.empty if is_dropless else torch.zeros
        partial = make(num_rows, column_tiles, dtype=weight.dtype, device=weight.device)
    num_programs = len(tiles.expert)
    _hidden_gradients[(num_programs * column_tiles,)](
        grad,
        read_grad,
        down,
        inner[0],
        inner[1] if len(inner) > 1 else None,
        read_inner,
        weight,
        hidden,
        products[0],
        products[1] if len(inner) > 1 else None,
        partial,
        *tiles[:3],
        num_programs,
        len(down),
        WIDTH_IN=down.shape[2],
        WIDTH_OUT=width,
        ACTIVATION=activation,
        **shape.options(precision()),
    )
    if partial is not None:
        partial = partial.sum(1) if column_tiles > 1 else partial.view(num_rows)
    return HiddenGradients(hidden, products, partial)


def outer_products(
    left: Tensor,
    right: Tensor,
    into: Into,
    tiles: Tiles,
    *,
    read_left: Tensor | None = None,
    read_right: Tensor | None = None,
) -> None:
    """Sum `left[read_left[a]]^T right[read_right[a]]` over each expert's rows: [E, I, O].

    An expert without rows adds nothing to its total, or sets zeros.
    """
    num_experts, width_in, width_out = into.out.shape
    rows = shape_of(left, tiles.rows, width_out, width_in).columns
    shape = shape_of(left, rows, width_in, width_out)
    if any(width * left.dtype.itemsize % 16 for width in (width_in, width_out)):
        # Both operands are gathered, and a pointer serves half as many numbers: with all of a
        # step's pointers, registers of sm_80 would spill.
        shape = shape._replace(depth=min(shape.depth, 32))
    grid = (
        num_experts * triton.cdiv(width_in, shape.rows) * triton.cdiv(width_out, shape.columns),
    )
    _outer_products[grid](
        left,
        read_left,
        right,
        read_right,
        into.total,
        into.out,
        tiles.ends,
        WIDTH_IN=width_in,
        WIDTH_OUT=width_out,
        **shape.options(precision()),
    )


@triton.jit(do_not_specialize=["num_rows"])
def _weigh_gradient(  # type: ignore[no-untyped-def]  # no Python types for its pointers
    outputs,
    grad,
    write,
    weight,
    num_valid,
    grad_weight,
    weighted,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < tl.load(num_valid)
    target = tl.load(write + rows, mask=is_row, other=0)
    factor = tl.load(weight + rows, mask=is_row, other=0.0)[:, None]
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = is_row[:, None] & (columns < WIDTH)[None, :]
        where = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        upstream = tl.load(
            grad + target[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        values = tl.load(outputs + where, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(values * upstream, 1)
        tl.store(weighted + where, (factor * upstream).to(weighted.dtype.element_ty), mask=mask)
    tl.store(grad_weight + rows, total, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_programs", "num_experts"])
def _hidden_gradients(  # type: ignore[no-untyped-def]
    grad,
    read_grad,
    down,
    inner,
    inner_gate,
    read_inner,
    weight,
    hidden,
    grad_inner,
    grad_gate,
    grad_weight,
    tile_expert,
    tile_row,
    ends,
    num_programs,
    num_experts,
    WIDTH_IN: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert, row, end, first_column, offset = find_tile(
        tile_expert, tile_row, ends, num_programs, num_experts, WIDTH_IN, WIDTH_OUT, COLUMNS
    )
    if expert < num_experts:
        rows, is_row, source = source_rows(row, end, read_grad, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total = add_product(
            total, grad, source, down + offset, columns,
            WIDTH_IN, WIDTH_OUT, True, PRECISION, COLUMNS, DEPTH,
        )  # fmt: skip
        inner_rows = rows.to(tl.int64)
        if read_inner is not None:
            inner_rows = tl.load(read_inner + rows, mask=is_row, other=0)
        share = tl.zeros((ROWS,), tl.float32)
        parts = quarters(total)
        for i in tl.static_range(4):
            columns = first_column + i * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
            share += store_gradients(
                parts[i], rows, is_row, inner_rows, columns,
                inner, inner_gate, weight, hidden, grad_inner, grad_gate, WIDTH_OUT, ACTIVATION,
            )  # fmt: skip
        if weight is not None:
            where = grad_weight + rows.to(tl.int64) * tl.cdiv(WIDTH_OUT, COLUMNS)
            where += first_column // COLUMNS
            tl.store(where, share, mask=is_row)


@triton.jit
def store_gradients(  # type: ignore[no-untyped-def]
    total,
    rows,
    is_row,
    inner_rows,
    columns,
    inner,
    inner_gate,
    weight,
    hidden,
    grad_inner,
    grad_gate,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Store what follows from some columns of the gradient `total` of the weighted hidden rows;
    returns their share of the gradient of the weights."""
    where = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    mask = is_row[:, None] & (columns < WIDTH)[None, :]
    dtype = hidden.dtype.element_ty
    from_inner = inner_rows[:, None] * WIDTH + columns[None, :]
    x = tl.load(inner + from_inner, mask=mask, other=0.0).to(tl.float32)
    values = activate(x, ACTIVATION)
    grad = total
    share = tl.zeros((total.shape[0],), tl.float32)
    if weight is not None:
        factor = tl.load(weight + rows, mask=is_row, other=0.0)[:, None]
        grad = total * factor
    if inner_gate is not None:
        gate = tl.load(inner_gate + from_inner, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_gate + where, (grad * values).to(dtype), mask=mask)
        grad = grad * gate
        values = values * gate
    if weight is not None:
        share = tl.sum(values * total, 1)
        values = values * factor
    tl.store(hidden + where, values.to(dtype), mask=mask)
    tl.store(grad_inner + where, (grad * slope(x, ACTIVATION)).to(dtype), mask=mask)
    return share


@triton.jit
def _outer_products(  # type: ignore[no-untyped-def]
    left,
    read_left,
    right,
    read_right,
    before,
    out,
    ends,
    WIDTH_IN: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (WIDTH_OUT + COLUMNS - 1) // COLUMNS
    TILES: tl.constexpr = (WIDTH_IN + ROWS - 1) // ROWS * COLUMN_TILES
    expert = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    first = tl.load(ends + expert)
    end = tl.load(ends + expert + 1)
    inputs = tile // COLUMN_TILES * ROWS + tl.arange(0, ROWS)
    outputs = tile % COLUMN_TILES * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, end, DEPTH):
        rows = start + tl.arange(0, DEPTH)
        is_row = rows < end
        from_left = rows.to(tl.int64)
        from_right = from_left
        if read_left is not None:
            from_left = tl.load(read_left + rows, mask=is_row, other=0)
        if read_right is not None:
            from_right = tl.load(read_right + rows, mask=is_row, other=0)
        a = tl.load(
            left + from_left[:, None] * WIDTH_IN + inputs[None, :],
            mask=is_row[:, None] & (inputs < WIDTH_IN)[None, :],
            other=0.0,
        )
        b = tl.load(
            right + from_right[:, None] * WIDTH_OUT + outputs[None, :],
            mask=is_row[:, None] & (outputs < WIDTH_OUT)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    offset = expert.to(tl.int64) * (WIDTH_IN * WIDTH_OUT)
    parts = quarters(total)
    for i in tl.static_range(4):
        outputs = tile % COLUMN_TILES * COLUMNS + i * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        where = offset + inputs[:, None] * WIDTH_OUT + outputs[None, :]
        mask = (inputs < WIDTH_IN)[:, None] & (outputs < WIDTH_OUT)[None, :]
        part = parts[i]
        if before is not None:
            part += tl.load(before + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + where, part.to(out.dtype.element_ty), mask=mask)
