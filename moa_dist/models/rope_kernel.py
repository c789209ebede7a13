"""The Triton kernel of rotary positions: reads and writes every row once, in any layout.

Shapes: B sequences, H heads, T tokens, d head width, W rotated dimensions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 512
"""Number of pairs in one program."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Rotate x [B, H, T, d] by tables [B or 1, 1, T, W / 2], the other way round with `back`.

    The result has the memory layout of x, so a transposed projection stays one.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    B, H, T, d = x.shape
    half = cos.shape[-1]
    out = torch.empty_like(x)
    columns = triton.next_power_of_2(max(half, d - 2 * half, 1))
    rows = max(_TILE // columns, 1)
    _rotate[(triton.cdiv(B * H * T, rows),)](
        x,
        cos.contiguous(),
        sin.contiguous(),
        out,
        B * H * T,
        H,
        T,
        half,
        d,
        *x.stride()[:3],
        *out.stride()[:3],
        0 if len(cos) == 1 else T * half,
        BACK=back,
        ROWS=rows,
        COLUMNS=columns,
    )
    return out


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _rotate(  # type: ignore[no-untyped-def]  # no Python types for its pointers
    x,
    cos,
    sin,
    out,
    num_rows,
    num_heads,
    num_tokens,
    half,
    width,
    stride_b,
    stride_h,
    stride_t,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    table_stride,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Consecutive rows are heads of one token: next to each other in memory after a projection.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    head = row % num_heads
    token = row // num_heads % num_tokens
    sequence = row // num_heads // num_tokens
    source = (x + sequence * stride_b + head * stride_h + token * stride_t)[:, None]
    target = (out + sequence * out_stride_b + head * out_stride_h + token * out_stride_t)[:, None]
    column = tl.arange(0, COLUMNS)
    mask = is_row[:, None] & (column < half)[None, :]
    table = (sequence * table_stride + token * half)[:, None] + column[None, :]
    c = tl.load(cos + table, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + table, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    first = tl.load(source + column[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half + column[None, :], mask=mask, other=0.0).to(tl.float32)
    value = first * c - second * s
    tl.store(target + column[None, :], value.to(out.dtype.element_ty), mask=mask)
    value = second * c + first * s
    tl.store(target + half + column[None, :], value.to(out.dtype.element_ty), mask=mask)
    mask = is_row[:, None] & (column < width - 2 * half)[None, :]
    rest = tl.load(source + 2 * half + column[None, :], mask=mask, other=0.0)
    tl.store(target + 2 * half + column[None, :], rest, mask=mask)
