"""The Triton kernel that sums rows by target: one program per few targets, no atomics.

Shapes as in `row_map`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moa_dist.kernels.row_map import Rows

_TILE = 1024
"""Numbers of the result per program: 8 for each of 128 threads, which load 16 bytes of bf16."""


def sum_by_row(
    rows: Tensor, to: Rows, *, scale: Tensor | None = None, num_valid: Tensor | None = None
) -> Tensor:
    """Compute `out[to.ids[a]] += scale[a] * rows[a]`: [A, O] -> [to.num, O], added in fp32.

    `rows` must be contiguous. If `num_valid`, a scalar int32, is given, rows from there on are
    skipped and may be uninitialized.
    """
    width = rows.shape[1]
    out = rows.new_empty(to.num, width)
    columns = min(triton.next_power_of_2(max(width, 1)), _TILE)
    targets = _TILE // columns
    grid = (triton.cdiv(to.num, targets), triton.cdiv(width, columns))
    _sum_by_row[grid](
        rows,
        scale,
        to.order,
        to.offsets,
        num_valid,
        out,
        to.num,
        EACH=len(to.ids) // max(to.num, 1) if to.offsets is None else None,
        WIDTH=width,
        TARGETS=targets,
        COLUMNS=columns,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["num_targets"])
def _sum_by_row(  # type: ignore[no-untyped-def]  # no Python types for its pointers
    rows,
    scale,
    order,
    offsets,
    num_valid,
    out,
    num_targets,
    EACH: tl.constexpr,
    WIDTH: tl.constexpr,
    TARGETS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    target = tl.program_id(0) * TARGETS + tl.arange(0, TARGETS)
    is_target = target < num_targets
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < WIDTH
    total = tl.zeros((TARGETS, COLUMNS), tl.float32)
    if offsets is None:
        begin = target * EACH
        end = begin + EACH
        most = EACH
    else:
        begin = tl.load(offsets + target, mask=is_target, other=0).to(tl.int32)
        end = tl.load(offsets + target + 1, mask=is_target, other=0).to(tl.int32)
        most = tl.max(end - begin, 0)
    if num_valid is not None:
        last = tl.load(num_valid)
    for i in tl.range(0, most, loop_unroll_factor=4):  # so that several loads are in flight
        is_term = is_target & (begin + i < end)
        term = tl.load(order + begin + i, mask=is_term, other=0)
        if num_valid is not None:
            is_term = is_term & (term < last)
        values = tl.load(
            rows + term[:, None] * WIDTH + columns[None, :],
            mask=is_term[:, None] & is_column[None, :],
            other=0.0,
        ).to(tl.float32)
        if scale is not None:
            values = values * tl.load(scale + term, mask=is_term, other=0.0)[:, None]
        total += values
    tl.store(
        out + target.to(tl.int64)[:, None] * WIDTH + columns[None, :],
        total.to(out.dtype.element_ty),
        mask=is_target[:, None] & is_column[None, :],
    )
