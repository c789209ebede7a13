"""How the Triton products are cut into tiles: their sizes, and which expert's rows each one takes.

The host never waits: the number of tiles per expert is computed on the device, the grid has as many
programs as there can be tiles at most, and those beyond the last one return immediately.

Shapes as in `row_map`; P programs along the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moa_dist.kernels.hardware import Hardware


class Shape(NamedTuple):
    """The size of a program's tile of the result, and how it is computed."""

    rows: int
    columns: int
    depth: int
    """Length of a step along the sum."""
    num_warps: int
    num_stages: int
    """Steps whose operands are in shared memory at once."""

    def flop_per_byte(self, element_bytes: int) -> float:
        """Return the work per byte that is loaded into shared memory."""
        return 2 * self.rows * self.columns / ((self.rows + self.columns) * element_bytes)

    def options(self, precision: str) -> dict[str, int | str]:
        """Return keyword arguments of a launch; `precision` is that of fp32 products."""
        return {
            "PRECISION": precision,
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


_SMALL_SHARED_MEMORY = {(7, 5), (8, 6), (8, 9), (12, 0), (12, 1)}
"""Compute capabilities with at most 99 KiB of shared memory per program."""


def rows_per_tile(x: Tensor, num_rows: int, num_experts: int) -> int:
    """Return the rows of a tile: fewer for wide types, and if most experts would not fill one."""
    return 64 if x.dtype.itemsize >= 4 or num_rows < 96 * num_experts else 128


def shape_of(x: Tensor, rows: int, width_in: int, width_out: int, num_results: int = 1) -> Shape:
    """Choose the tile of `num_results` equal products, of rows in the type of `x`.

    For narrow types 128 x 128 results in 8 warps are 64 registers per thread: more would spill with
    the pointers of gathered rows. Two results share those registers, and where a width is no
    multiple of 8 bytes, so that a pointer serves few numbers, half as many must do. fp32 has no
    tensor cores unless TF32 is allowed, and twice the bytes; its unrolled operands would spill in
    fewer warps or longer steps.
    """
    narrow = x.dtype.itemsize < 4
    aligned = all(width * x.dtype.itemsize % 8 == 0 for width in (width_in, width_out))
    widest = (128 if narrow and aligned else 64) // num_results
    columns = max(16, min(widest, triton.next_power_of_2(width_out)))
    many = rows * columns * num_results > 64 * 128 or not (aligned and narrow)
    num_stages = 2 if capability_of(x) in _SMALL_SHARED_MEMORY else 3
    return Shape(rows, columns, 64 if narrow else 16, 8 if many else 4, num_stages)


def capability_of(x: Tensor) -> tuple[int, int]:
    """Return the compute capability of the GPU that holds `x`; Triton's interpreter has none."""
    return Hardware.of(x.device).capability or (0, 0)


class Tiles(NamedTuple):
    """The rows that each program multiplies; shared by all products of one row map."""

    expert: Tensor
    """[P] int32, the expert of each program; E for programs beyond the last tile."""
    first_row: Tensor
    """[P] int32, where its tile begins."""
    ends: Tensor
    """[E + 1] int32, where each expert's rows end, after a leading 0."""
    rows: int
    """Rows of a tile."""

    @property
    def num_valid(self) -> Tensor:
        """Scalar, the number of rows that have an expert."""
        return self.ends[-1]


def tiles_of(counts: Tensor, num_rows: int, rows: int) -> Tiles:
    """Cover with tiles of `rows` rows those of `counts` [E], which sum to at most `num_rows`."""
    num_experts = len(counts)
    num_programs = _aligned(num_rows // rows + num_experts)
    ints = torch.empty(2 * num_programs + num_experts + 1, dtype=torch.int32, device=counts.device)
    expert, first_row, ends = ints.split([num_programs, num_programs, num_experts + 1])
    _map_tiles[(num_experts + 1,)](
        counts,
        expert,
        first_row,
        ends,
        num_experts,
        num_programs,
        ROWS=rows,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK=128,
        num_warps=4,
    )
    return Tiles(expert, first_row, ends, rows)


def _aligned(length: int) -> int:
    """Round up so that what follows so many int32 starts at a multiple of 16 bytes."""
    return -(-length // 4) * 4


@triton.jit(do_not_specialize=["num_experts", "num_programs"])
def _map_tiles(  # type: ignore[no-untyped-def]  # no Python types for its pointers
    counts,
    tile_expert,
    tile_row,
    ends,
    num_experts,
    num_programs,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per expert, which lists its tiles, and one for the tiles beyond the last."""
    expert = tl.program_id(0)
    ids = tl.arange(0, EXPERTS)
    count = tl.load(counts + ids, mask=ids < num_experts, other=0).to(tl.int32)
    num_tiles = (count + ROWS - 1) // ROWS
    first_row = tl.sum(tl.where(ids < expert, count, 0), 0)
    first_tile = tl.sum(tl.where(ids < expert, num_tiles, 0), 0)
    tl.store(ends + expert, first_row)
    last_tile = first_tile + tl.sum(tl.where(ids == expert, num_tiles, 0), 0)
    if expert == num_experts:
        last_tile = num_programs
    for start in range(first_tile, last_tile, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        mask = tile < tl.minimum(last_tile, num_programs)
        tl.store(tile_expert + tile, expert, mask=mask)
        tl.store(tile_row + tile, first_row + (tile - first_tile) * ROWS, mask=mask)


@triton.jit
def find_tile(  # type: ignore[no-untyped-def]
    tile_expert,
    tile_row,
    ends,
    num_programs,
    num_experts,
    WIDTH_IN: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return a program's expert, first row, end of its expert's rows, first column, and where its
    expert's matrix begins; the expert is `num_experts` if nothing is left to do.

    Programs that run together share rows and matrices: they go through `GROUP` row tiles for each
    column tile, so that both operands stay in the cache.
    """
    GROUP: tl.constexpr = 8
    COLUMN_TILES: tl.constexpr = (WIDTH_OUT + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    first = program // (GROUP * COLUMN_TILES) * GROUP
    size = tl.minimum(num_programs - first, GROUP)
    within = program % (GROUP * COLUMN_TILES)
    tile = first + within % size
    expert = tl.load(tile_expert + tile)
    row = tl.load(tile_row + tile)
    end = tl.load(ends + tl.minimum(expert + 1, num_experts))
    offset = expert.to(tl.int64) * (WIDTH_IN * WIDTH_OUT)
    return expert, row, end, within // size * COLUMNS, offset
