"""Triton's kernels, run by its interpreter on the CPU, against the CPU's own.

fp16 stands for all narrow types: the interpreter multiplies bf16 as if it were integers.
"""

import pytest
import torch

from moa_dist.kernels import cpu_blocked, triton_fused
from moa_dist.kernels.row_map import ExpertWeights
from moa_dist.kernels.saved import scales_outputs
from tests.kernels.uses import USES, inputs

COUNTS = {
    "more than a tile": [70, 1, 0, 5],
    "empty experts": [0, 9, 0],
    "no rows": [0, 0],
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3)], ids=str
)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_equals_the_kernel_of_the_cpu(use, counts, dtype, tolerance):
    experts, x, row_map, _ = inputs(use, counts, dtype)
    x, weight, down, *ups = (
        None if t is None else t.detach() for t in (x, row_map.weight, experts.down, *experts.ups)
    )
    experts = ExpertWeights(down, tuple(ups), experts.activation)
    row_map = row_map._replace(weight=weight)

    def both_passes(kernel):
        y, saved = kernel.forward(experts, x, row_map)
        upstream = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
        taken = sum(counts)
        *most, grad_ups = kernel.backward(upstream, experts, x, row_map, saved)
        return [y, saved.outputs[:taken], *(p[:taken] for p in saved.products), *most, *grad_ups]

    ours, theirs = both_passes(triton_fused), both_passes(cpu_blocked)
    assert len(ours) == len(theirs) == 5 + 2 * len(ups)
    assert ours[1].numel() == 0 or scales_outputs(experts, row_map)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == right.dtype
        scale = right.abs().max().item() if right.numel() else 0
        torch.testing.assert_close(mine, right, rtol=0, atol=tolerance * max(scale, 1e-6))
