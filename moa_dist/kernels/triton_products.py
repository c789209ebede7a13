"""Triton kernels of the forward pass: rows times their expert's matrix, gathered as they are read.

Each result is written once, in the type of the rows. Shapes as in `row_map`; a product's input and
output widths are I and O.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moa_dist.kernels.triton_operands import (
    activate,
    add_product,
    halves,
    load_matrix,
    load_rows,
    precision,
    source_rows,
)
from moa_dist.kernels.triton_tiles import Tiles, capability_of, find_tile, shape_of

Operand = tuple[Tensor, Tensor]
"""Rows [A, I], and matrices [E, I, O]."""


def product(
    pairs: list[Operand],
    out: Tensor,
    tiles: Tiles,
    *,
    read: Tensor | None = None,
    scale: Tensor | None = None,
    write: Tensor | None = None,
    transposed: bool = False,
) -> None:
    """Set `out[write[a]] = scale[a] * sum of left[read[a]] @ matrices[e]` over one or two pairs.

    `write` [A] must not repeat a row. Matrices are stored as [E, O, I] if `transposed`. All tensors
    must be contiguous.
    """
    (left, matrices), *second = pairs
    more_left, more_matrices = second[0] if second else (None, None)
    width_in, width_out = left.shape[1], out.shape[1]
    # Before sm_90, the pointers of a second pair leave registers for half as many results.
    crowded = len(pairs) if capability_of(left) < (9, 0) else 1
    shape = shape_of(left, tiles.rows, width_in, width_out, crowded)
    num_programs = len(tiles.expert)
    grid = (num_programs * triton.cdiv(width_out, shape.columns),)
    _product[grid](
        left,
        read,
        matrices,
        more_left,
        more_matrices,
        scale,
        out,
        write,
        *tiles[:3],
        num_programs,
        len(matrices),
        WIDTH_IN=width_in,
        WIDTH_OUT=width_out,
        TRANSPOSED=transposed,
        **shape.options(precision()),
    )


def hidden_products(
    x: Tensor,
    read: Tensor,
    ups: tuple[Tensor, ...],
    weight: Tensor | None,
    activation: str,
    products: tuple[Tensor, ...],
    tiles: Tiles,
) -> Tensor:
    """Set `products` [A, F] to those of `x[read]` with `ups`; returns the weighted hidden rows."""
    width_in, width_out = ups[0].shape[1:]
    hidden = torch.empty_like(products[0])
    shape = shape_of(x, tiles.rows, width_in, width_out, len(ups))
    num_programs = len(tiles.expert)
    grid = (num_programs * triton.cdiv(width_out, shape.columns),)
    _hidden_products[grid](
        x,
        read,
        ups[0],
        ups[1] if len(ups) > 1 else None,
        weight,
        products[0],
        products[1] if len(ups) > 1 else None,
        hidden,
        *tiles[:3],
        num_programs,
        len(ups[0]),
        WIDTH_IN=width_in,
        WIDTH_OUT=width_out,
        ACTIVATION=activation,
        **shape.options(precision()),
    )
    return hidden


@triton.jit(do_not_specialize=["num_programs", "num_experts"])
def _product(  # type: ignore[no-untyped-def]  # no Python types for its pointers
    left,
    read,
    matrices,
    more_left,
    more_matrices,
    scale,
    out,
    write,
    tile_expert,
    tile_row,
    ends,
    num_programs,
    num_experts,
    WIDTH_IN: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert, row, end, first_column, offset = find_tile(
        tile_expert, tile_row, ends, num_programs, num_experts, WIDTH_IN, WIDTH_OUT, COLUMNS
    )
    if expert < num_experts:
        rows, is_row, source = source_rows(row, end, read, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total = add_product(
            total, left, source, matrices + offset, columns,
            WIDTH_IN, WIDTH_OUT, TRANSPOSED, PRECISION, COLUMNS, DEPTH,
        )  # fmt: skip
        if more_left is not None:
            total = add_product(
                total, more_left, source, more_matrices + offset, columns,
                WIDTH_IN, WIDTH_OUT, TRANSPOSED, PRECISION, COLUMNS, DEPTH,
            )  # fmt: skip
        if scale is not None:
            total = total * tl.load(scale + rows, mask=is_row, other=0.0)[:, None]
        target = rows.to(tl.int64)
        if write is not None:
            target = tl.load(write + rows, mask=is_row, other=0)
        tl.store(
            out + target[:, None] * WIDTH_OUT + columns[None, :],
            total.to(out.dtype.element_ty),
            mask=is_row[:, None] & (columns < WIDTH_OUT)[None, :],
        )


@triton.jit(do_not_specialize=["num_programs", "num_experts"])
def _hidden_products(  # type: ignore[no-untyped-def]
    x,
    read,
    up,
    gate,
    weight,
    up_product,
    gate_product,
    hidden,
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
        rows, is_row, source = source_rows(row, end, read, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        gates = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, WIDTH_IN, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            a = load_rows(x, source, depth, WIDTH_IN, DEPTH)
            b = load_matrix(up + offset, depth, columns, WIDTH_IN, WIDTH_OUT, False, DEPTH, COLUMNS)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            if gate is not None:
                b = load_matrix(
                    gate + offset, depth, columns, WIDTH_IN, WIDTH_OUT, False, DEPTH, COLUMNS
                )
                gates = tl.dot(a, b, gates, input_precision=PRECISION)
        parts, gate_parts = halves(total), halves(gates)
        for i in tl.static_range(2):
            columns = first_column + i * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            where = rows.to(tl.int64)[:, None] * WIDTH_OUT + columns[None, :]
            mask = is_row[:, None] & (columns < WIDTH_OUT)[None, :]
            # The backward pass sees rounded products, so the activation does as well.
            product = parts[i].to(x.dtype.element_ty)
            tl.store(up_product + where, product, mask=mask)
            values = activate(product.to(tl.float32), ACTIVATION)
            if gate is not None:
                product = gate_parts[i].to(x.dtype.element_ty)
                tl.store(gate_product + where, product, mask=mask)
                values = values * product.to(tl.float32)
            if weight is not None:
                values = values * tl.load(weight + rows, mask=is_row, other=0.0)[:, None]
            tl.store(hidden + where, values.to(x.dtype.element_ty), mask=mask)
