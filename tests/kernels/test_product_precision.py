"""Whether products of fp32 matrices round to TF32 is set and read by one interface of torch's."""

import pytest
import torch

from moa_dist.distributed.device import set_product_precision
from moa_dist.kernels import triton_fused
from tests.kernels.uses import USES, inputs


@pytest.fixture(autouse=True)
def restored():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield
    matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("precision", "products"),
    [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee"), ("fp64", "ieee")],
)
def test_kernels_run_under_every_precision(precision, products):
    """Torch raises where one interface is written and the other one read."""
    set_product_precision(precision)
    assert torch.backends.cuda.matmul.fp32_precision == products
    experts, x, row_map, _ = inputs(next(iter(USES.values())), [2, 0, 3], torch.float32)
    with torch.no_grad():
        y, _ = triton_fused.forward(experts, x, row_map)
    assert y.isfinite().all()
