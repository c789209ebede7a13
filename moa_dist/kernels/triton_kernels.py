"""Two Triton kernels: rows times their expert's matrix, and the gradient of those matrices.

Both gather the rows they read, and the first adds to the rows it writes, so no gathered copy
exists. The host never waits: the number of row tiles per expert is computed on the device, and
programs beyond the last tile return immediately.

Shapes as in `row_map`; a product's input and output widths are I and O.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _DEPTH = 64, 64, 32
"""Size of a tile of the result, and of a step along the sum; tensor cores need at least 16."""


class Tiles(NamedTuple):
    """The rows that each program multiplies; shared by all products of one row map."""

    expert: Tensor
    """[P] int32, the expert of each of P programs; E for programs beyond the last tile."""
    first_row: Tensor
    """[P] int32, where its tile begins."""
    ends: Tensor
    """[E + 1] int32, where each expert's rows end, after a leading 0."""


def tiles_of(counts: Tensor, num_rows: int) -> Tiles:
    """Cover with tiles the rows of `counts` [E] int64, which sum to at most `num_rows`."""
    num_experts = len(counts)
    tiles = (counts + _ROWS - 1) // _ROWS
    last = tiles.cumsum(0)
    program = torch.arange(num_rows // _ROWS + num_experts, device=counts.device)
    expert = torch.searchsorted(last, program, right=True)
    valid = expert.clamp(max=num_experts - 1)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    first_row = ends[valid] + (program - (last - tiles)[valid]) * _ROWS
    return Tiles(expert.int(), first_row.int(), ends.int())


def add_product(
    left: Tensor,
    matrices: Tensor,
    out: Tensor,
    tiles: Tiles,
    *,
    read: Tensor | None = None,
    write: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Add `scale[a] * left[read[a]] @ matrices[e]` to `out[write[a]]`, or set `out[a]` to it.

    Without `write` it sets. `matrices` [E, I, O] may have any strides; `left` and `out` must have
    dense rows, and `out` must be fp32 where it is added to.
    """
    E, width_in, width_out = matrices.shape
    grid = (len(tiles.expert), triton.cdiv(width_out, _COLUMNS))
    _product[grid](
        left,
        left if read is None else read,
        matrices,
        left if scale is None else scale,
        out,
        left if write is None else write,
        *tiles,
        E,
        width_in,
        width_out,
        *matrices.stride(),
        GATHER=read is not None,
        SCALE=scale is not None,
        SCATTER=write is not None,
        PRECISION=_precision(),
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
    )


def outer_products(
    left: Tensor,
    right: Tensor,
    like: Tensor,
    tiles: Tiles,
    *,
    read: Tensor | None = None,
    write: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Sum `scale[a] * left[read[a]]^T right[write[a]]` over each expert's rows: [E, I, O].

    Returns the type and shape of `like`, and zeros for an expert without rows.
    """
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    E, width_in, width_out = out.shape
    grid = (E, triton.cdiv(width_in, _COLUMNS), triton.cdiv(width_out, _COLUMNS))
    _outer[grid](
        left,
        left if read is None else read,
        right,
        right if write is None else write,
        left if scale is None else scale,
        out,
        tiles.ends,
        width_in,
        width_out,
        GATHER_LEFT=read is not None,
        GATHER_RIGHT=write is not None,
        SCALE=scale is not None,
        PRECISION=_precision(),
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
    )
    return out


def _precision() -> str:
    """Return the precision of fp32 products that torch's own matmul is set to."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def _product(  # type: ignore[no-untyped-def]  # no Python types for its pointers
    left,
    read,
    matrices,
    scale,
    out,
    write,
    tile_expert,
    tile_row,
    ends,
    num_experts,
    width_in,
    width_out,
    stride_e,
    stride_i,
    stride_o,
    GATHER: tl.constexpr,
    SCALE: tl.constexpr,
    SCATTER: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert < num_experts:
        rows = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, ROWS)
        is_row = rows < tl.load(ends + expert + 1)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = columns < width_out
        source = rows.to(tl.int64)
        if GATHER:
            source = tl.load(read + rows, mask=is_row, other=0)
        matrix = matrices + expert.to(tl.int64) * stride_e
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, width_in, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            is_depth = depth < width_in
            a = tl.load(
                left + source[:, None] * width_in + depth[None, :],
                mask=is_row[:, None] & is_depth[None, :],
                other=0.0,
            )
            b = tl.load(
                matrix + depth[:, None] * stride_i + columns[None, :] * stride_o,
                mask=is_depth[:, None] & is_column[None, :],
                other=0.0,
            )
            total += tl.dot(a, b, input_precision=PRECISION)
        if SCALE:
            total = total * tl.load(scale + rows, mask=is_row, other=0.0)[:, None]
        mask = is_row[:, None] & is_column[None, :]
        if SCATTER:
            target = tl.load(write + rows, mask=is_row, other=0)
            tl.atomic_add(out + target[:, None] * width_out + columns[None, :], total, mask=mask)
        else:
            target = rows.to(tl.int64)
            values = total.to(out.dtype.element_ty)
            tl.store(out + target[:, None] * width_out + columns[None, :], values, mask=mask)


@triton.jit
def _outer(  # type: ignore[no-untyped-def]
    left,
    read,
    right,
    write,
    scale,
    out,
    ends,
    width_in,
    width_out,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert = tl.program_id(0)
    first = tl.load(ends + expert)
    end = tl.load(ends + expert + 1)
    inputs = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    outputs = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_input = inputs < width_in
    is_output = outputs < width_out
    total = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    for start in range(first, end, DEPTH):
        rows = start + tl.arange(0, DEPTH)
        is_row = rows < end
        source = rows.to(tl.int64)
        target = rows.to(tl.int64)
        if GATHER_LEFT:
            source = tl.load(read + rows, mask=is_row, other=0)
        if GATHER_RIGHT:
            target = tl.load(write + rows, mask=is_row, other=0)
        a = tl.load(
            left + source[:, None] * width_in + inputs[None, :],
            mask=is_row[:, None] & is_input[None, :],
            other=0.0,
        )
        b = tl.load(
            right + target[:, None] * width_out + outputs[None, :],
            mask=is_row[:, None] & is_output[None, :],
            other=0.0,
        )
        if SCALE:
            b = (b * tl.load(scale + rows, mask=is_row, other=0.0)[:, None]).to(b.dtype)
        total += tl.dot(tl.trans(a), b, input_precision=PRECISION)
    base = out + expert.to(tl.int64) * width_in * width_out
    tl.store(
        base + inputs[:, None] * width_out + outputs[None, :],
        total.to(out.dtype.element_ty),
        mask=is_input[:, None] & is_output[None, :],
    )
