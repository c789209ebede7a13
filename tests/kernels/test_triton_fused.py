"""Triton's kernels, run by its interpreter on the CPU, against the CPU's own and against fp64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moa_dist.kernels import cpu_blocked, triton_fused
from moa_dist.kernels.grouped import grouped_experts
from moa_dist.kernels.row_map import ExpertWeights, RowMap
from moa_dist.kernels.saved import scales_outputs
from moa_dist.moe.dispatch import Level, LocalTokenDispatcher
from moa_dist.moe.router import Routing
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


@dataclass(frozen=True)
class Case:
    """A routed projection of a model, at home."""

    read: Level
    write: Level
    d_in: int
    d_out: int
    hidden: int = 0
    num_ups: int = 0
    activation: str = "relu"
    weighted: bool = True
    num_groups: int = 1
    top_k: int = 2
    experts: str = "any"
    dropped: float = 0.0
    num_tokens: int = 12
    num_experts: int = 5


CASES = {
    "44M FFN": Case("token", "token", 412, 412, 128, 1, top_k=3),
    "44M values": Case("token", "group", 412, 82, num_groups=2),
    "44M outputs": Case("group", "token", 82, 412, num_groups=2),
    "own text values": Case("token", "group", 384, 76, num_groups=2),
    "own text outputs": Case("group", "token", 76, 384, num_groups=2),
    "MoA queries": Case("token", "slot", 64, 160, weighted=False),
    "MoA outputs": Case("slot", "token", 160, 64),
    "JetMoE outputs": Case("slot", "token", 64, 160),
    "narrow gated": Case("token", "token", 96, 96, 40, 2, "silu"),
    "wide gated": Case("token", "token", 48, 48, 150, 2, "gelu"),
    "squared": Case("token", "token", 40, 40, 24, 1, "relu_squared"),
    "wide FFN": Case("token", "token", 40, 300, 200, 1, "gelu"),
    "K 1": Case("token", "token", 32, 32, 16, 1, top_k=1),
    "K 16": Case("token", "token", 32, 32, 16, 1, num_experts=20, top_k=16),
    "all to one expert": Case("token", "token", 32, 32, 16, 1, experts="one", num_tokens=140),
    "one group of experts idle": Case("token", "group", 32, 8, experts="few", num_groups=2),
    "drops": Case("token", "token", 32, 32, 16, 1, dropped=0.4),
    "drops, values": Case("token", "group", 32, 8, num_groups=2, dropped=0.4),
    "drops, outputs": Case("group", "token", 8, 32, num_groups=2, dropped=0.4),
    "drops, queries": Case("token", "slot", 32, 16, weighted=False, dropped=0.4),
    "drops, JetMoE outputs": Case("slot", "token", 16, 32, dropped=0.4),
    "all dropped": Case("token", "token", 32, 32, 16, 1, dropped=1.0),
}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def draw(case: Case) -> tuple[ExpertWeights, Tensor, RowMap]:
    """In bf16 values of any type; every row map is that of a local plan."""
    generator = torch.Generator().manual_seed(0)
    T, G, K, E = case.num_tokens, case.num_groups, case.top_k, case.num_experts

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().double()

    scores = torch.rand(T, G, E, generator=generator)
    if case.experts == "one":
        scores[..., 1] = 2
        K = 1
    if case.experts == "few":
        scores[..., 3:] = 0
    chosen = scores.topk(K).indices + torch.arange(G)[:, None] * E
    kept = torch.rand(T, G, K, generator=generator) >= case.dropped
    routing = Routing(
        topk_ids=chosen,
        topk_weights=torch.rand(T, G, K, generator=generator),
        keep_mask=kept if case.dropped else None,
        statistics=None,
    )
    plan = LocalTokenDispatcher().plan(routing, G * E)
    row_map = plan.row_map(case.read, case.write, G * E, case.weighted)
    ups = tuple(randn(G * E, case.d_in, case.hidden) for _ in range(case.num_ups))
    down = randn(G * E, case.hidden or case.d_in, case.d_out)
    experts = ExpertWeights(down / down.shape[1] ** 0.5, ups, case.activation)
    return experts, randn(row_map.read.num, case.d_in), row_map


def cast(dtype: torch.dtype, experts: ExpertWeights, x: Tensor, row_map: RowMap) -> tuple:
    scaled = tuple(up / up.shape[1] ** 0.5 for up in experts.ups)
    weight = row_map.weight
    if weight is not None:
        weight = weight.to(torch.promote_types(dtype, torch.float32))
    return (
        ExpertWeights(
            experts.down.bfloat16().to(dtype),
            tuple(up.bfloat16().to(dtype) for up in scaled),
            experts.activation,
        ),
        x.to(dtype),
        row_map._replace(weight=weight),
    )


@pytest.mark.usefixtures("interpreted_bf16")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_fp64(case, dtype):
    drawn = draw(case)
    experts, x, row_map = cast(torch.float64, *drawn)
    sources = [x, *([row_map.weight] if case.weighted else []), *experts.tensors()]
    for source in sources:
        source.requires_grad_()
    expected = grouped_experts(experts, x, row_map)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(expected.shape, generator=generator).bfloat16()
    exact = [expected, *torch.autograd.grad(expected, sources, upstream.double())]

    narrow = cast(dtype, *drawn)
    y, saved = triton_fused.forward(*narrow)
    found = triton_fused.backward(upstream.to(dtype), *narrow, saved)
    ours = [y, found.x, *([found.weight] if case.weighted else []), found.down, *found.ups]
    # A square doubles the relative error of what is rounded to bf16 before it.
    tolerance = TOLERANCES[dtype] * (2 if case.activation == "relu_squared" else 1)
    for mine, right in zip(ours, exact, strict=True):
        scale = right.abs().max().item()
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=tolerance * max(scale, 1e-6))


@pytest.mark.usefixtures("interpreted_bf16")
def test_many_bfloat16_rows_are_summed_in_fp32_also_backward():
    """300 ones: a bfloat16 sum stops at 256."""
    chosen = torch.zeros(1, 1, 300, dtype=torch.int64)
    routing = Routing(chosen, torch.ones(1, 1, 300), None, None)
    row_map = LocalTokenDispatcher().plan(routing, 1).row_map("token", "token", 1, True)
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    experts = ExpertWeights(torch.ones(1, 1, 1, dtype=torch.bfloat16))
    y, saved = triton_fused.forward(experts, x, row_map)
    assert y.item() == 300
    assert triton_fused.backward(torch.ones_like(y), experts, x, row_map, saved).x.item() == 300
