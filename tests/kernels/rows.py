"""Rows as plans make them."""

import torch

from moa_dist.kernels.row_map import Rows


def evenly(each: int, num: int, generator: torch.Generator) -> Rows:
    """Give each of `num` rows `each` assignments, in any order."""
    index = torch.arange(num).repeat_interleave(each)
    index = index[torch.randperm(len(index), generator=generator)]
    return Rows(index, index.argsort(stable=True), None, num)


def assert_sorted_by_row(rows: Rows) -> None:
    """What the GPU's sums go by must name the same rows as `ids`, which the CPU's go by."""
    counts = torch.full((rows.num,), len(rows.ids) // max(rows.num, 1))
    if rows.offsets is not None:
        counts = rows.offsets.diff()
    expected = torch.arange(rows.num).repeat_interleave(counts)
    assert torch.equal(rows.ids[rows.order], expected)
    assert torch.equal(rows.order.sort().values, torch.arange(len(rows.ids)))
