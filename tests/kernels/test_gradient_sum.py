"""Gradients of several uses of a matrix are added in fp32 and rounded once, in every kernel."""

import pytest
import torch
from torch import Tensor

from moa_dist.kernels import cpu_blocked, triton_fused
from moa_dist.kernels.gradient_sum import GradientSum
from tests.kernels.uses import USES, inputs

COUNTS, NUM_USES = [3, 0, 5, 2], 9
KERNELS = {"CPU": cpu_blocked, "Triton": triton_fused}


def upstream(y: Tensor, use: int) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(use)).to(y.dtype)


@pytest.mark.usefixtures("interpreted_bf16")
@pytest.mark.parametrize("num_known", [NUM_USES, NUM_USES - 1, NUM_USES + 1])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_sum_is_rounded_once(kernel, num_known):
    """Also if there are fewer uses than was known; one use too many costs one more rounding."""
    experts, x, row_map, _ = inputs(USES["MoA queries"], COUNTS, torch.bfloat16)
    experts, x = experts._replace(down=experts.down.detach()), x.detach()
    total = GradientSum(experts.down, num_known)
    exact = torch.zeros_like(experts.down, dtype=torch.float64)
    y, saved = kernel.forward(experts, x, row_map)
    expert_of = [e for e, count in enumerate(COUNTS) for _ in range(count)]
    for use in range(NUM_USES):
        grad = upstream(y, use)
        kernel.backward(grad, experts, x, row_map, saved, (total.into(experts.down),))
        for a, e in enumerate(expert_of):
            row = x[row_map.read.ids[a]].double()
            exact[e] += row.outer(grad[row_map.write.ids[a]].double())
    found = total.take()
    assert found is not None
    assert found.dtype == torch.bfloat16
    error = (found.double() - exact).abs()
    if num_known >= NUM_USES:
        # Triton's interpreter cuts off what a GPU rounds.
        once = 2**-7 if kernel is triton_fused else 2**-8
        assert (error <= once * exact.abs() + 1e-5).all()
    assert error.norm() < 2**-7 * exact.norm()
    assert total.take() is None


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_sum_is_that_of_separate_gradients(kernel, use):
    experts, x, row_map, _ = inputs(USES[use], COUNTS, torch.float32)
    sums = [GradientSum(matrix, 3) for matrix in experts.tensors()]
    expected = [torch.zeros_like(matrix) for matrix in experts.tensors()]
    with torch.no_grad():
        y, saved = kernel.forward(experts, x, row_map)
        for i in range(3):
            operands = upstream(y, i), experts, x, row_map, saved
            into = tuple(s.into(m) for s, m in zip(sums, experts.tensors(), strict=True))
            apart = kernel.backward(*operands)
            together = kernel.backward(*operands, into)
            torch.testing.assert_close(together.x, apart.x)
            for term, gradient in zip(expected, (apart.down, *apart.ups), strict=True):
                term += gradient
    for total, gradient in zip(sums, expected, strict=True):
        torch.testing.assert_close(total.take(), gradient, rtol=1e-5, atol=1e-5)


def test_a_later_pass_begins_anew():
    total = GradientSum(torch.zeros(2, dtype=torch.bfloat16), 2)
    for _ in range(2):
        for _ in range(2):
            total.add(torch.ones(2, dtype=torch.bfloat16))
        found = total.take()
        assert found is not None
        assert found.tolist() == [2, 2]
