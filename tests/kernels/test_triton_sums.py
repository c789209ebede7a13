"""Rows are summed by target in fp32, each result rounded once; Triton's kernel in its interpreter.

On CPUs the differentiable sums take the same numbers through torch.
"""

import pytest
import torch

from moa_dist.kernels.row_map import Rows
from moa_dist.kernels.segment_sum import gather_rows, permute, segment_sum, sum_rows
from moa_dist.kernels.triton_sums import sum_by_row
from tests.kernels.rows import evenly

NUM_TARGETS = 7
GENERATOR = torch.Generator().manual_seed(0)


def rows_of(kind: str) -> Rows:
    if kind == "uneven":  # some targets have no rows
        return Rows.of(torch.randint(1, NUM_TARGETS - 1, (40,), generator=GENERATOR), NUM_TARGETS)
    if kind == "none":
        return Rows.of(torch.empty(0, dtype=torch.int64), NUM_TARGETS)
    return evenly(int(kind), NUM_TARGETS, GENERATOR)


@pytest.mark.parametrize("width", [1, 76, 128, 412, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["uneven", "none", "1", "2", "16"])
def test_sums_by_target(kind, dtype, width):
    to = rows_of(kind)
    rows = torch.randn(len(to.ids), width, generator=GENERATOR).to(dtype)
    exact = torch.zeros(to.num, width, dtype=torch.float64).index_add(0, to.ids, rows.double())
    for summed in (sum_by_row(rows, to), segment_sum(rows, to)):
        assert summed.dtype == dtype
        torch.testing.assert_close(summed, exact.to(dtype), rtol=8e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["uneven", "2"])
def test_rows_without_an_expert_are_never_read(kind):
    to = rows_of(kind)
    rows = torch.randn(len(to.ids), 12, generator=GENERATOR)
    scale = torch.rand(len(rows), generator=GENERATOR)
    valid = len(rows) // 2
    kept = torch.arange(len(rows))[:, None] < valid
    expected = torch.zeros(to.num, 12)
    expected.index_add_(0, to.ids, torch.where(kept, rows * scale[:, None], 0))
    rows[valid:] = torch.nan
    num_valid = torch.tensor(valid, dtype=torch.int32)
    torch.testing.assert_close(sum_by_row(rows, to, scale=scale, num_valid=num_valid), expected)


def test_a_sum_in_bf16_would_be_different():
    """300 ones: a bfloat16 sum stops at 256, as torch's own does in its type."""
    for to in (evenly(300, 2, GENERATOR), Rows.of(torch.arange(2).repeat(300), 2)):
        ones = torch.ones(600, 4, dtype=torch.bfloat16)
        assert torch.equal(sum_by_row(ones, to), torch.full((2, 4), 300.0, dtype=torch.bfloat16))
        assert torch.equal(segment_sum(ones, to), sum_by_row(ones, to))
        x = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
        gather_rows(x, to).backward(ones)
        assert (x.grad == 300).all()


def test_gathering_and_summing_are_each_others_gradient():
    to = rows_of("uneven")
    x, rows = (
        torch.randn(n, 3, dtype=torch.float64, generator=GENERATOR, requires_grad=True)
        for n in (to.num, len(to.ids))
    )
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, to), x)
    assert torch.autograd.gradcheck(lambda rows: sum_rows(rows, to), rows)
    order = torch.randperm(len(rows), generator=GENERATOR)
    assert torch.autograd.gradcheck(lambda v: permute(v, order, order.argsort()), rows[:, 0])
