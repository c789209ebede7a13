"""What all Triton products share: their inner loop, operands, and the activations between them.

A product's input and output widths are I and O.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def precision() -> str:
    """Return the precision of fp32 products that torch's own matmul is set to."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def load_matrix(  # type: ignore[no-untyped-def]  # no Python types for its pointers
    matrix,
    depth,
    columns,
    WIDTH_IN: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Load a tile of one expert's matrix [I, O], which is stored as [O, I] if `TRANSPOSED`."""
    if TRANSPOSED:
        pointers = matrix + columns[None, :] * WIDTH_IN + depth[:, None]
    else:
        pointers = matrix + depth[:, None] * WIDTH_OUT + columns[None, :]
    if WIDTH_IN % DEPTH == 0 and WIDTH_OUT % COLUMNS == 0:
        return tl.load(pointers)
    return tl.load(
        pointers, mask=(depth < WIDTH_IN)[:, None] & (columns < WIDTH_OUT)[None, :], other=0.0
    )


@triton.jit
def load_rows(  # type: ignore[no-untyped-def]
    rows, source, depth, WIDTH: tl.constexpr, DEPTH: tl.constexpr
):
    """Load a tile of rows that are `WIDTH` wide. Widths are constants, so that the compiler knows
    how many numbers are aligned and loads no more than those at once."""
    pointers = rows + source[:, None] * WIDTH + depth[None, :]
    if WIDTH % DEPTH == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=(depth < WIDTH)[None, :], other=0.0)


@triton.jit
def add_product(  # type: ignore[no-untyped-def]
    total,
    left,
    source,
    matrix,
    columns,
    WIDTH_IN: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add rows `source` of `left` times columns of a matrix to `total`, in fp32."""
    for start in range(0, WIDTH_IN, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        a = load_rows(left, source, depth, WIDTH_IN, DEPTH)
        b = load_matrix(matrix, depth, columns, WIDTH_IN, WIDTH_OUT, TRANSPOSED, DEPTH, COLUMNS)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def source_rows(row, end, read, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a tile's rows, which of them exist, and what they read; those that do not, a valid
    row, so that it can be loaded without a mask."""
    rows = row + tl.arange(0, ROWS)
    is_row = rows < end
    if read is None:
        source = tl.minimum(rows, end - 1).to(tl.int64)
    else:
        source = tl.load(read + tl.minimum(rows, end - 1))
    return rows, is_row, source


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply an activation of `moa_dist.kernels.activations` to fp32; None is the identity."""
    if ACTIVATION == "relu":
        y = tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "relu_squared":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACTIVATION is None)
        y = x
    return y


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the derivative of `activate` at x in fp32."""
    if ACTIVATION == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        y = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACTIVATION == "relu_squared":
        y = 2.0 * tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACTIVATION is None)
        y = tl.full(x.shape, 1.0, tl.float32)
    return y


@triton.jit
def halves(x):  # type: ignore[no-untyped-def]
    """Split a tile in its left and its right columns, to be stored one after the other: what an
    epilogue computes from a whole tile may need more registers than there are."""
    x = tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1))
    return tl.split(x)


@triton.jit
def quarters(x):  # type: ignore[no-untyped-def]
    """Split a tile by columns in four, as `halves` does."""
    left, right = halves(x)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth
