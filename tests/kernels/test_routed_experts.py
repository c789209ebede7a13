"""The fused and the step-by-step kernels against one assignment at a time."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moa_dist.kernels import cpu_blocked
from moa_dist.kernels.custom_op import custom_op_experts
from moa_dist.kernels.grouped import grouped_experts
from moa_dist.kernels.hardware import Hardware
from moa_dist.kernels.routed_experts import kernel_for, recomputed_experts, routed_experts
from moa_dist.kernels.row_map import ExpertWeights, RowMap, Rows
from tests.kernels.uses import USES, gradients, inputs, one_at_a_time

COUNTS = {
    "uneven": [3, 1, 6, 2],
    "empty experts": [0, 5, 0, 0, 2, 0],
    "one expert takes all": [0, 7, 0],
    "no rows": [0, 0, 0],
    "many rows": [40, 0, 5, 33, 3],
}


@pytest.fixture(params=[1, 200, 1 << 20], ids=["expert by expert", "some experts", "one block"])
def block_bytes(request):
    """The size of a block must not change the result."""
    with mock.patch.object(cpu_blocked, "_BLOCK_BYTES", request.param):
        yield


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_equals_one_assignment_at_a_time(use, counts):
    experts, x, row_map, sources = inputs(use, counts)
    expected = one_at_a_time(experts, x, row_map)
    expected_gradients = gradients(expected, sources) if sum(counts) else None
    for way in (custom_op_experts, grouped_experts):
        y = way(experts, x, row_map)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        if expected_gradients is not None:
            ours = gradients(y, sources)
            torch.testing.assert_close(ours, expected_gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
@pytest.mark.parametrize("counts", [COUNTS["uneven"], COUNTS["many rows"]], ids=str)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_narrow_types_agree_with_fp64(use, counts, dtype, tolerance):
    experts, x, row_map, sources = inputs(use, counts, dtype)
    y = custom_op_experts(experts, x, row_map)
    assert y.dtype == dtype
    exact = [source.detach().double().requires_grad_() for source in sources]
    num_ups = use.num_ups
    wide = ExpertWeights(exact[1], tuple(exact[2 : 2 + num_ups]), experts.activation)
    wide_map = row_map._replace(weight=exact[-1] if use.weighted else None)
    expected = grouped_experts(wide, exact[0], wide_map)
    ours = [y, *gradients(y, sources)]
    theirs = [expected, *gradients(expected, exact)]
    for mine, right in zip(ours, theirs, strict=True):
        scale = right.abs().max().item()
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_an_expert_without_rows_has_a_zero_gradient_not_none(use, counts):
    """None would skip weight decay, or hang a rank that waits for the reduction."""
    experts, x, row_map, _ = inputs(use, counts)
    custom_op_experts(experts, x, row_map).square().sum().backward()
    for matrices in (experts.down, *experts.ups):
        for e, count in enumerate(counts):
            assert matrices.grad[e].any() == (count > 0)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_recomputation_changes_nothing(use):
    experts, x, row_map, sources = inputs(use, COUNTS["uneven"])
    plain = custom_op_experts(experts, x, row_map)
    expected = gradients(plain, sources)
    for recomputed in (
        checkpoint(custom_op_experts, experts, x, row_map, use_reentrant=False),
        recomputed_experts(experts, x, row_map),
    ):
        assert torch.equal(plain, recomputed)
        both = zip(gradients(recomputed, sources), expected, strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in both)


class ShapesOfProducts(TorchDispatchMode):
    """Records the shapes of the operands of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[torch.Size, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.mkldnn._linear_pointwise.default, torch.ops.aten.mm.default):
            self.shapes.add((args[0].shape, args[1].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_products_have_the_same_shapes_whatever_the_loads(use, dtype):
    """OneDNN compiles each shape anew."""

    def shapes(counts):
        experts, x, row_map, _ = inputs(use, counts, dtype)
        with torch.no_grad(), ShapesOfProducts() as recorded:
            y, saved = cpu_blocked.forward(experts, x, row_map)
            cpu_blocked.backward(y, experts, x, row_map, saved)
        return recorded.shapes

    assert shapes([1, 5, 31, 33]) == shapes([2, 8, 25, 40]) == shapes([32, 64])


def test_many_bfloat16_rows_are_summed_in_fp32_also_backward():
    """300 ones: a bfloat16 sum stops at 256."""
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    one = Rows.of(torch.zeros(300, dtype=torch.int64), 1)
    row_map = RowMap(one, one, torch.ones(300).long(), True, torch.ones(300))
    y = custom_op_experts(ExpertWeights(torch.ones(300, 1, 1, dtype=torch.bfloat16)), x, row_map)
    y.backward()
    assert y.item() == 300
    assert x.grad.item() == 300


@pytest.mark.parametrize("counts", [[5], [4, 4]], ids=str)
def test_counts_that_do_not_fit_raise(counts):
    experts, x, row_map, _ = inputs(USES["sigma-MoE"], [2, 3])
    with pytest.raises(ValueError, match=r"7 rows and 2 experts, but counts"):
        routed_experts(experts, x, row_map._replace(counts=torch.tensor(counts)))


@pytest.mark.parametrize(
    ("hardware", "dtype", "kernel"),
    [
        (Hardware("cpu"), torch.bfloat16, custom_op_experts),
        (Hardware("cuda"), torch.bfloat16, custom_op_experts),
        (Hardware("cuda"), torch.float32, custom_op_experts),
        (Hardware("cuda"), torch.float64, grouped_experts),
        (Hardware("cuda", has_triton=False), torch.bfloat16, grouped_experts),
    ],
)
def test_a_kernel_can_be_chosen_for_hardware_that_is_not_here(hardware, dtype, kernel):
    x = torch.empty(10, 16, dtype=dtype, device="meta")
    experts = ExpertWeights(torch.empty(3, 16, 8, dtype=dtype, device="meta"))
    assert kernel_for(experts, x, hardware).run is kernel
