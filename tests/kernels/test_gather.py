"""Gradients of gathered rows are summed in fp32, whatever their type."""

import torch

from moa_dist.kernels.row_map import Rows
from moa_dist.kernels.segment_sum import gather_rows

NUM_ROWS, COPIES, WIDTH = 32, 16, 64


def test_gradient_of_a_row_gathered_often_is_rounded_once():
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(NUM_ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    index = torch.arange(NUM_ROWS).repeat_interleave(COPIES)
    index = index[torch.randperm(len(index), generator=generator)]
    upstream = torch.randn(len(index), WIDTH, generator=generator).bfloat16()
    exact = torch.zeros(NUM_ROWS, WIDTH, dtype=torch.float64).index_add(0, index, upstream.double())
    (ours,) = torch.autograd.grad(gather_rows(x, Rows.of(index, NUM_ROWS)), x, upstream)
    narrow = torch.zeros_like(exact, dtype=torch.bfloat16)  # as CUDA's atomics add
    for copies in upstream[index.argsort()].view(NUM_ROWS, COPIES, WIDTH).unbind(1):
        narrow += copies
    assert ours.dtype == torch.bfloat16
    ours_error, narrow_error = ((g.double() - exact).abs().max() for g in (ours, narrow))
    assert ours_error <= (exact.bfloat16().double() - exact).abs().max() * 1.01
    assert narrow_error > 2 * ours_error


def test_values_and_gradients_in_wide_types_are_those_of_torch():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 4])
    rows = Rows.of(index, 5)
    assert torch.equal(gather_rows(x, rows), x[index])
    assert torch.autograd.gradcheck(lambda value: gather_rows(value, rows), x)
